"""What an index of documents adds to SmolLM2: to a decode step, and to scoring a prompt of 512 tokens.

    python benchmarks/mixing.py --segment ours.segment --text held_out.npy indexed.npy

The segment and the texts (token ids, .npy) are those that `benchmarks/index.py --work DIR` leaves in DIR. Arms take turns
step by step; "alone again" is the noise. A decode step is the model on one more token with its cache, then the choice of the
likeliest; with memory the logits processor stands between. Scoring is one forward and the log-probability and entropy of
every token: alone by `log_softmax`, with memory by `engram_lm.mixing.score`; "one pass" reads the logits as that does,
without memory. Wall time; medians of differences side by side with bootstrap 95 % intervals. The last line is JSON, also
written to benchmarks/results/mixing.json.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import timing
import torch
from machine import circumstances
from tables_generation import interval
from transformers import DynamicCache

from engram_lm import load_base
from engram_lm.index.segment import Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot
from engram_lm.mixing import default_gate, memory_processor, onepass, score
from engram_lm.mixing.identity import rules_of

SEED, LIMIT, PROMPT = 0, 0.03, 512
RESULT = Path(__file__).resolve().parent / "results" / "mixing.json"


def turns(arms, steps):
    """Wall seconds of every step of every arm, in every order."""
    seconds = {name: [] for name in arms}
    orders = list(itertools.permutations(arms))
    np.random.default_rng(SEED).shuffle(orders)
    for step in range(steps):
        for name in orders[step % len(orders)]:
            start = time.perf_counter()
            arms[name](step)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds, base):
    """Each arm's spread, and what it adds to the base pair by pair."""
    found = {name: timing.spread(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        if name != base:
            added = (np.array(values) - seconds[base]) / np.median(seconds[base])
            found[name]["added_share"] = interval(added)
    return found


def decoding(model, tokenizer, snapshot, gate, tokens, *, steps):
    """Steps of one token after a prompt of 64; each arm reads the text's own tokens with a cache of its own."""
    ids = torch.from_numpy(tokens[: 64 + steps].astype(np.int64))[None]
    processor = memory_processor(snapshot, gate, ids[:, :64], tokenizer=tokenizer, model=model)
    caches = {}
    own = []

    def arm(name):
        cache = caches[name] = DynamicCache(config=model.config)
        model(ids[:, :64], past_key_values=cache)

        def step(t):
            logits = model(ids[:, 64 + t : 65 + t], past_key_values=cache).logits[:, -1]
            if name == "memory":
                start = time.perf_counter()
                logits = processor(ids[:, : 65 + t], logits)
                own.append(time.perf_counter() - start)
            return int(logits.argmax())

        return step

    found = summary(turns({name: arm(name) for name in ("alone", "alone again", "memory")}, steps), "alone")
    found["memory"]["processor"] = timing.spread(own)
    found["memory"]["processor_share"] = float(np.median(own) / found["alone"]["median_s"])
    return found


def scoring(model, tokenizer, snapshot, gate, prompts):
    """Log-probability and entropy of 512 tokens."""
    rules = rules_of(tokenizer, model, snapshot)
    rows = [torch.from_numpy(ids.astype(np.int64))[None] for ids in prompts]

    def alone(t):
        log_p = model(rows[t], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return log_p.gather(1, rows[t][0, 1:, None]), -(log_p.exp() * log_p).sum(-1)

    def one_pass(t):
        logits = model(rows[t], use_cache=False).logits[0, :-1].float().numpy()
        survey = np.empty((len(logits), 6))
        onepass.survey_rows(logits, rows[t][0, 1:].numpy(), np.zeros(len(logits), np.int64), survey)

    arms = {
        "alone": alone,
        "alone again": alone,
        "one pass": one_pass,
        "memory": lambda t: score(model, rows[t], snapshot, gate, rules=rules),
    }
    for run in arms.values():
        run(0)
    return summary(turns(arms, len(rows)), "alone")


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segment", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=144)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer, _ = load_base("smollm2")
    segment = Segment.open(options.segment, verify="all")
    snapshot, gate = Snapshot([LiveSegment(segment)], vocab_size=segment.vocab_size), default_gate()
    found = {
        "benchmark": "mixing", **circumstances("engram-lm", "torch", "transformers", "numpy", "numba"), "seed": SEED,
        "model": "SmolLM2-135M-Instruct", "dtype": str(model.dtype), "threads": options.threads,
        "index_tokens": len(segment), "at_most_added": LIMIT, "decoding": {}, "scoring": {},
    }  # fmt: skip
    start = time.process_time()
    snapshot.prepare(count=gate.reading.count, cap=gate.reading.cap)
    found["prepare_cpu_s"] = time.process_time() - start
    rng = np.random.default_rng(SEED)
    for path in options.text:
        tokens = np.load(path, mmap_mode="r")
        at = int(rng.integers(0, len(tokens) - 64 - options.steps))
        found["decoding"][path.stem] = one = decoding(
            model, tokenizer, snapshot, gate, np.array(tokens[at:]), steps=options.steps
        )
        print(f"  decode step, {path.stem}: {told(one)}", flush=True)
        places = rng.integers(0, len(tokens) - PROMPT, options.prompts)
        found["scoring"][path.stem] = one = scoring(
            model, tokenizer, snapshot, gate, [np.array(tokens[at : at + PROMPT]) for at in places]
        )
        print(f"  scoring {PROMPT} tokens, {path.stem}: {told(one)}", flush=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


def told(found):
    added = [
        f"{name} {100 * one['added_share']['median']:+.1f} % ({100 * one['added_share']['low']:+.1f} to "
        f"{100 * one['added_share']['high']:+.1f})"
        for name, one in found.items()
        if "added_share" in one
    ]
    return f"{1e3 * found['alone']['median_s']:.1f} ms; " + ", ".join(added)


if __name__ == "__main__":
    main()
