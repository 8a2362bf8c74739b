"""What the demo's memory learned: perplexity and facts, memory on and off, on text it saw and text it did not.

    python experiments/demo_memory/evaluate.py --data DATA --memory src/engram_lm/demo/memory --articles 250

Writes results.json beside this file. A fact counts when greedy decoding says the whole answer (checked in one forward:
the arg max at every answer token is the answer). Verbatim prompts are the article's own words, paraphrases are not.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import torch
from articles import lines_of, probes_of, short_articles
from train import keep_freed_memory
from transformers import AutoTokenizer

from engram_lm import from_pretrained


def perplexity(model, tokenizer, texts: list[str], *, memory: str) -> dict:
    """Over every token but each text's first; texts cut at 256 tokens."""
    loss, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :256]
        if ids.shape[1] < 2:
            continue
        with torch.no_grad():
            logits = model(ids, memory=memory, use_cache=False).logits[0, :-1]
        loss += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return {"perplexity": round(math.exp(loss / count), 3), "tokens": count}


def said(model, tokenizer, prompt: str, answer: str, *, memory: str) -> bool:
    """Whether greedy decoding continues `prompt` with the whole of ` answer`."""
    start = tokenizer(prompt).input_ids
    ids = torch.tensor([tokenizer(f"{prompt} {answer}").input_ids])
    if ids[0, : len(start)].tolist() != start:
        return False
    with torch.no_grad():
        best = model(ids, memory=memory, use_cache=False).logits[0].argmax(-1)
    return bool((best[len(start) - 1 : -1] == ids[0, len(start) :]).all())


def machine() -> dict:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        found = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        cpu = found[0].split(":")[1].strip() if found else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "commit": commit or None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--memory", type=Path, required=True)
    parser.add_argument("--articles", type=int, required=True, help="as many as the training read")
    parser.add_argument("--texts", type=int, default=60, help="of each kind")
    parser.add_argument("--facts", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    model, tokenizer = from_pretrained(options.memory), AutoTokenizer.from_pretrained(options.memory)
    probes_file = options.data / "probes/enwiki2014_probes.jsonl.xz"
    corpora = options.data / "corpora"
    with_fact = {p["id"] for p in lines_of(probes_file)}
    learned = short_articles(corpora / "enwiki2014-train-00.jsonl.xz", options.articles, ids=with_fact)
    handbook = [x["text"][:1000] for x in lines_of(options.data / "domain/handbook18f.jsonl.xz")]
    texts = {
        "articles it read": [x["text"] for x in learned],
        "articles it never saw": [
            x["text"] for x in short_articles(corpora / "enwiki2014-valid.jsonl.xz", options.texts)
        ],
        "other prose (a company handbook)": handbook,
    }
    result = {"perplexity": {}, "facts": {}}
    for name, found in texts.items():
        result["perplexity"][name] = {
            mode: perplexity(model, tokenizer, found[: options.texts], memory=mode) for mode in ("off", "on")
        }
        print(name, result["perplexity"][name], flush=True)
    probes = probes_of(probes_file, learned)[: options.facts]
    common = {
        r: Counter(p["answer"] for p in probes if p["relation"] == r).most_common(1)[0]
        for r in {p["relation"] for p in probes}
    }
    majority = sum(n for _, n in common.values()) / len(probes)
    result["facts"] = {"n": len(probes), "majority answer of the relation": round(majority, 3)}
    kinds = {"verbatim": lambda p: [p["prompt"]], "paraphrased": lambda p: p["paraphrases"]}
    for kind, prompts_of in kinds.items():
        cases = [(prompt, probe["answer"]) for probe in probes for prompt in prompts_of(probe)]
        result["facts"][kind] = {"n": len(cases)} | {
            mode: round(sum(said(model, tokenizer, *case, memory=mode) for case in cases) / len(cases), 3)
            for mode in ("off", "on")
        }
        print(kind, result["facts"][kind], flush=True)
    log = [json.loads(x) for x in (options.memory / "log.jsonl").read_text().splitlines()]
    result["training"] = {
        "articles": len(learned),
        "steps": log[-1]["step"],
        "passes": log[-1]["pass"],
        "seconds": log[-1]["seconds"],
    }
    result |= {"machine": machine(), "seed": 0, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    result["command"] = (
        f"evaluate.py --articles {options.articles} --texts {options.texts} --facts {options.facts}"
    )
    (Path(__file__).parent / "results.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s")
