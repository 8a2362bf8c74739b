"""Fit, bound and check the gate that is shipped for SmolLM2 (src/engram_lm/mixing/gate-smollm2.json).

$ python experiments/instant_adaptation/fit_gate.py --data DATA --cache DIR

DATA holds corpora/, domain/ and probes/ as named in gate_texts.py; they are not part of this repository. The model reads
80,000 tokens once (six minutes on one core; kept in DIR). Everything after that takes a minute.
"""

import argparse
import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from gate_texts import HANDBOOK, Text, chosen, corpora, halves, plan_texts, read_model

from engram_lm.identity import print_of
from engram_lm.index.segment import Document, Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot
from engram_lm.mixing.fit import Examples, calibrate, draw_calibration, examples_of, fit_gate, report
from engram_lm.mixing.gate import Gate, LookupConfig
from engram_lm.mixing.identity import model_print, rules_of
from engram_lm.mixing.lookups import read_text, tail
from engram_lm.mixing.mix import TokenRules

HERE = Path(__file__).parent
GATE = HERE.parents[1] / "src" / "engram_lm" / "mixing" / "gate-smollm2.json"
SIZES = {"1": 1, "10": 10, "100": 100, "all": None}
BOUND = 0.005
# weight 1 leaves no room below the bound for kinds of text that nobody fitted on
SHIPPED = ("documents", 0.75, "logistic", 2.0)


def memory_of(documents: dict[str, np.ndarray], names: list[str], vocab_size: int) -> Snapshot:
    segment = Segment.build(
        [documents[name] for name in names],
        vocab_size=vocab_size,
        documents=[Document(id=name) for name in names],
    )
    return Snapshot([LiveSegment(segment)], vocab_size=vocab_size)


class Collector:
    """Turns texts and memories into examples, without asking the model again."""

    def __init__(self, head_VD: np.ndarray, rules: TokenRules, domains, plan: list[Text], heads) -> None:
        self.head_VD, self.rules, self.domains = head_VD, rules, domains
        self.texts = list(zip(plan, heads, strict=True))
        self.memories = {}
        for domain, documents in domains.items():
            pool = halves(documents)[0] if domain == HANDBOOK else list(documents)
            pool = chosen({name: documents[name] for name in pool}, len(pool), seed=5)
            for size, n in SIZES.items():
                if n is None or n < len(pool):
                    self.memories[domain, size] = (
                        memory_of(documents, pool[:n], rules.n_tokens),
                        set(pool[:n]),
                    )

    def collect(self, reading: LookupConfig, *, draws: int = 3) -> dict[str, Examples]:
        """Examples by use: fit, bound, check."""
        self.reading = reading
        others = [key for key in self.memories if key[0] != HANDBOOK]
        random, parts = np.random.default_rng(0), {"fit": [], "bound": [], "check": []}
        for text, head in self.texts:
            use = text.role.split()[0]
            if text.role in ("fit", "bound") and not text.domain:
                for i in random.choice(len(others), draws, replace=False):
                    parts[use].append(
                        self.examples(text, head, self.memories[others[i]][0], text.source, "general")
                    )
                continue
            for size in SIZES:
                key = (text.domain or HANDBOOK, size)
                if key not in self.memories or (text.role == "check indexed" and size != "all"):
                    continue
                memory, names = self.memories[key]
                if use == "fit" and text.id in names:
                    if len(names) == 1:
                        continue
                    memory = memory.without(text.id)
                name = f"{text.domain if use == 'fit' else text.role[6:]}, {size}"
                kind = "domain" if text.domain else "general"
                parts[use].append(self.examples(text, head, memory, name, kind))
        return {use: Examples.join(found) for use, found in parts.items()}

    def examples(self, text: Text, head: dict, memory: Snapshot, group: str, kind: str) -> Examples:
        rows = tail(read_text(memory, text.ids, self.rules, self.reading))
        survey = head["survey"].copy()
        of_top = (head["hidden"][:-1] * self.head_VD[np.maximum(rows.top, 0)]).sum(1) - survey[:, 5]
        survey[:, 1] = np.where(rows.top >= 0, of_top, -np.inf)
        return examples_of(rows, survey, tokens=memory.n_tokens, group=group, kind=kind)


def line(row: dict) -> str:
    change = 100 * (row["perplexity_mixed"] / row["perplexity_alone"] - 1)
    return (
        f"{row['group']:28} {row['tokens']:7,} {row['perplexity_alone']:8.2f} {row['perplexity_mixed']:8.2f} "
        f"{change:+7.2f} %   mean lambda {row['mean_lambda']:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    options = parser.parse_args()
    import torch

    from engram_lm.bases.base import load_base

    # documents are longer than the model's context; only windows of them are read
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model, tokenizer, base = load_base("smollm2")
    domains = corpora(options.data, tokenizer)
    plan = plan_texts(options.data, tokenizer, domains)
    heads = read_model(model, plan, options.cache)
    head_VD = model.get_output_embeddings().weight.detach().numpy()
    empty = Snapshot([], vocab_size=head_VD.shape[0])
    collector = Collector(head_VD, rules_of(tokenizer, model, empty), domains, plan, heads)

    results, shipped = [], None
    for count, discount in (("tokens", 0.5), ("tokens", 0.75), ("tokens", 0.9), ("documents", 0.75)):
        reading = LookupConfig(count=count, discount=discount)
        parts = collector.collect(reading)
        for kind in ("logistic", "mlp"):
            for weight in (0.5, 1.0, 2.0, 4.0) if kind == "logistic" else (2.0,):
                start = time.perf_counter()
                gate = fit_gate(
                    parts["fit"], kind=kind, general_weight=weight, tokenizer=print_of(tokenizer).text,
                    model=model_print(model), model_name=base.name, reading=reading, trained_on=described(plan, weight),
                )  # fmt: skip
                seconds = time.perf_counter() - start
                gate = calibrate(gate, parts["bound"], bound=BOUND)
                checked = report(gate, parts["check"])
                # of pages that are in the index every long match is right: they would flatter the picture
                others = [name for name in parts["check"].groups if not name.startswith("indexed")]
                checked["calibration"] = report(gate, parts["check"].of(others))["calibration"]
                results.append({
                    "count": count, "discount": discount, "kind": kind, "general_weight": weight,
                    "fit_seconds": round(seconds, 1), "shift": gate.shift, "bound_worst": gate.measured["worst_general"],
                    "check": {row["group"]: rounded(row) for row in checked["groups"]},
                })  # fmt: skip
                print(f"\n{count} {discount} {kind} weight {weight}: {seconds:.1f} s, shift {gate.shift:.2f}")
                print(*[line(row) for row in checked["groups"]], sep="\n", flush=True)
                if (count, discount, kind, weight) == SHIPPED:
                    shipped = gate, checked
    write(*shipped, results)


def described(plan: list[Text], weight: float) -> dict:
    sources = sorted({text.source for text in plan if text.role == "fit"})
    return {
        "script": "experiments/instant_adaptation/fit_gate.py",
        "sources": sources,
        "tokens": sum(len(text.ids) for text in plan if text.role == "fit"),
        "index_sizes": list(SIZES),
        "left_out": "the document itself",
        "general_weight": weight,
    }


def rounded(row: dict) -> dict:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def write(gate: Gate, checked: dict, results: list[dict]) -> None:
    held = gate.measured
    measured = {
        "bound": held["bound"],
        "worst_general": round(held["worst_general"], 5),
        "bound_on": [rounded(row) for row in held["groups"]],
        "checked_on": [rounded(row) for row in checked["groups"]],
    }
    replace(gate, measured=measured).save(GATE)
    draw_calibration(
        checked["calibration"], HERE / "calibration.png", title="the shipped gate on text it has not seen"
    )
    table = {
        "shipped": SHIPPED,
        "calibration": [rounded(row) for row in checked["calibration"]],
        "gates": results,
    }
    (HERE / "gate-results.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
