"""Does a channel of compressed contexts help? Perplexity with the exact channel, the compressed one, and both averaged.

$ python experiments/compressed_channel/run.py --data DATA --cache DIR        # ten minutes of one busy core the first time

DATA holds the texts of experiments/instant_adaptation (its `gate_texts.py` chooses them; they are not part of this
repository): half of a company handbook is in the index, pages of both halves and wikitext-2 are read. The model reads
31,000 tokens once (kept in DIR).
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "instant_adaptation"))
import gate_texts
from gate_texts import HANDBOOK, chosen, halves, plan_texts, read_model

from engram_lm.bases.base import load_base
from engram_lm.index.compressed import BlendedSnapshot, bytes_of
from engram_lm.index.segment import Document, Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot
from engram_lm.mixing.fit import Examples, examples_of, lambdas, report
from engram_lm.mixing.gate import default_gate
from engram_lm.mixing.identity import rules_of
from engram_lm.mixing.lookups import read_text, tail
from engram_lm.vocab import TokenMap

SIZES = (1, 10, None)
# 0: the exact channel alone
SHARES = (0.0, 0.25, 0.5, 0.75, 0.999)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    options = parser.parse_args()
    import torch

    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model, tokenizer, _ = load_base("smollm2", report=lambda line: None)
    start = time.process_time()
    gate_texts.FILES = {HANDBOOK: gate_texts.FILES[HANDBOOK]}
    gate_texts.BOOKS = ()
    domains = gate_texts.corpora(options.data, tokenizer)
    # the other domains are named in the plan of texts to fit on, which are not read here
    plan = [text for text in plan_texts_of(options.data, tokenizer, domains) if text.role.startswith("check")]
    heads = read_model(model, plan, options.cache)
    head_VD = model.get_output_embeddings().weight.detach().numpy()
    V, gate, tokens = head_VD.shape[0], default_gate(), TokenMap.from_tokenizer(tokenizer)
    rules = rules_of(tokenizer, model, Snapshot([], vocab_size=V))
    documents = domains[HANDBOOK]
    pool = chosen({name: documents[name] for name in halves(documents)[0]}, len(halves(documents)[0]), seed=5)
    found = {"canonical ids": tokens.size, "ids": V, "rows": []}
    for n in SIZES:
        names = pool[:n]
        exact = Snapshot(
            [
                LiveSegment(
                    Segment.build(
                        [documents[i] for i in names], vocab_size=V, documents=[Document(id=i) for i in names]
                    )
                )
            ],
            vocab_size=V,
        )
        if n is None:
            begin = time.process_time()
            extra = bytes_of(exact, tokens)
            found["bytes"] = {
                "tokens": exact.n_tokens, "compressed channel": extra, "a token": extra / exact.n_tokens,
                "seconds to make": time.process_time() - begin,
            }  # fmt: skip
        for share in SHARES:
            memory = BlendedSnapshot(exact, tokens, share=share) if share else exact
            parts = [
                examples(text, head, memory, gate, rules, head_VD)
                for text, head in zip(plan, heads, strict=True)
                if text.role != "check indexed" or n is None
            ]
            joined = Examples.join(parts)
            for row in report(gate, joined)["groups"]:
                of = joined.of([row["group"]])
                row |= {"pages": exact.n_documents, "share": share, "best fixed lambda": best_fixed(of)}
                row["mean_p_memory"] = float(of.p_memory[of.found].mean()) if of.found.any() else 0.0
                row["lambda > 0.5"] = float((lambdas(gate, of) > 0.5).mean())
                found["rows"].append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
                told = f"{exact.n_documents:4} pages  share {share:5.3f}  {row['group']:10} {row['perplexity_alone']:7.3f} → "
                best = row["best fixed lambda"]["perplexity"]
                print(f"{told}{row['perplexity_mixed']:7.3f}   best fixed λ: {best:7.3f}", flush=True)
    found["cpu_seconds"] = round(time.process_time() - start, 1)
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")


def plan_texts_of(data, tokenizer, domains):
    """`plan_texts` without the domains that gates are fitted on."""
    kept, gate_texts.ENCYCLOPAEDIA = gate_texts.ENCYCLOPAEDIA, HANDBOOK
    try:
        return plan_texts(data, tokenizer, domains)
    finally:
        gate_texts.ENCYCLOPAEDIA = kept


def examples(text, head, memory, gate, rules, head_VD):
    rows = tail(read_text(memory, text.ids, rules, gate.reading))
    survey = head["survey"].copy()
    of_top = (head["hidden"][:-1] * head_VD[np.maximum(rows.top, 0)]).sum(1) - survey[:, 5]
    survey[:, 1] = np.where(rows.top >= 0, of_top, -np.inf)
    kind = "domain" if text.domain else "general"
    return examples_of(rows, survey, tokens=memory.n_tokens, group=text.role[6:], kind=kind)


def best_fixed(examples):
    """The one lambda for all positions that is best for them, which no gate needs: what P_memory itself is worth."""
    p_model, best = np.exp(examples.log_p_model), (0.0, float(np.exp(-examples.log_p_model.mean())))
    for lam in (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8):
        p = np.where(examples.found, (1 - lam) * p_model + lam * examples.p_memory, p_model)
        best = min(best, (lam, float(np.exp(-np.log(p).mean()))), key=lambda pair: pair[1])
    return {"lambda": best[0], "perplexity": round(best[1], 4)}


if __name__ == "__main__":
    main()
