"""Hit rates of row caches on real text: four texts, two profiles, 1, 8 and 64 requests at a time.

    python experiments/cache_simulation/run.py --data DATA --tokenizer TOKENIZER_JSON

DATA holds the texts (see README.md), TOKENIZER_JSON is DeepSeek's. Writes results.json beside this file; every run is
kept as soon as it is done, and runs that are there already are not repeated. draw.py draws what is there.

`heads` below 8 simulates the first heads of each order with rows as many times as wide: heads of an order see the same
n-grams and differ by collisions alone. It makes long streams affordable; the groups `exact` and `one head` say what it costs.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

from engram_lm.addressing import PROFILES, SHIPPED, resolve
from engram_lm.bases.tokenizer import load_tokenizer
from engram_lm.cachesim.report import as_dict, as_hashed
from engram_lm.cachesim.requests import Requests, read_requests
from engram_lm.cachesim.simulate import simulate

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "benchmarks"))
from machine import circumstances, peak_memory_bytes

TEXTS = {
    "encyclopaedia": "corpora/enwiki2014-train-00.jsonl.xz",
    "textbook": "corpora/openstax-ccby.jsonl.xz",
    "chinese": "corpora/zhwiki-sample.jsonl.xz",
    "handbook": "domain/handbook18f.jsonl.xz",
}
# Rows as served: V4.1 in fp8 with scales; Qwen in fp8 with one scale for the table.
BYTES_PER_ROW = {"deepseek-v4.1": 264, "qwen-ple": 160}
# DeepSeek's end of sentence, and its vocabulary, stand in for Qwen's.
EOS, RAW_VOCABULARY = 1, 129_280
BUDGETS = [4 * 10**6, 32 * 10**6, 256 * 10**6, 2 * 10**9]
MILLION = 1_000_000
SEED = 0


def runs() -> list[dict]:
    """What is run. What is not said is the default of `one_run`."""
    profiles = ("deepseek-v4.1", "qwen-ple")
    every = [
        {"group": "main", "profile": profile, "text": text, "heads": 2, "slots": slots}
        for profile in profiles
        for text in TEXTS
        for slots in (1, 8, 64)
    ]
    book = {"text": "encyclopaedia", "profile": "deepseek-v4.1"}
    every += [{"group": "layer", **book, "heads": 2, "layer": 14, "slots": 8}]
    every += [{"group": "cold", **book, "heads": 2, "warm_up": 0.0, "slots": 8}]
    every += [
        {"group": "prefill", **book, "heads": 2, "prefill": 256, "slots": slots} for slots in (1, 8, 64)
    ]
    every += [{"group": "ngram", **book, "entry": "ngram", "slots": 8}]
    every += [
        {
            "group": "file order",
            "text": "textbook",
            "profile": "deepseek-v4.1",
            "heads": 2,
            "shuffle": False,
            "slots": slots,
        }
        for slots in (1, 64)
    ]
    for profile in profiles:
        every += [
            {"group": "length", "text": text, "profile": profile, "heads": 1, "slots": 64, "tokens": tokens}
            for text, lengths in (
                ("encyclopaedia", (MILLION // 4, MILLION, 4 * MILLION, 16 * MILLION)),
                ("textbook", (MILLION // 4, MILLION, 5 * MILLION)),
                ("chinese", (MILLION // 4, MILLION)),
                ("handbook", (MILLION // 4,)),
            )
            for tokens in lengths
        ]
    every += [
        {
            "group": "other text",
            "text": text,
            "profile": "deepseek-v4.1",
            "heads": 2,
            "slots": 1,
            "after": "encyclopaedia",
        }
        for text in ("textbook", "chinese", "handbook")
    ]
    # All heads, and one: what leaving heads out costs.
    every += [{"group": "exact", **book, "slots": slots} for slots in (1, 64)]
    every += [{"group": "one head", **book, "heads": 1, "slots": slots} for slots in (1, 64)]
    return every


def cut(requests: Requests, tokens: int) -> Requests:
    """The first requests, until they hold `tokens`."""
    n = int(np.searchsorted(np.cumsum(requests.tokens_Q), tokens)) + 1
    tokens_Q = requests.tokens_Q[:n]
    return replace(
        requests, ids_T=requests.ids_T[: tokens_Q.sum()], tokens_Q=tokens_Q, prompt_Q=requests.prompt_Q[:n]
    )


def joined(first: Requests, second: Requests) -> Requests:
    pairs = {
        name: np.concatenate([getattr(first, name), getattr(second, name)])
        for name in ("ids_T", "tokens_Q", "prompt_Q")
    }
    return replace(second, name=f"{first.name}, then {second.name}", **pairs)


class Texts:
    """Texts as ids, tokenized once."""

    def __init__(self, data: Path, tokenizer: str) -> None:
        self.data, self.tokenizer = data, load_tokenizer(tokenizer)
        self.raw: dict[str, Requests] = {}
        self.mapped: dict[str, tuple[Requests, int]] = {}

    def of(self, name: str, profile: str) -> tuple[Requests, int]:
        if name not in self.raw:
            self.raw[name] = read_requests(self.data / TEXTS[name], tokenizer=self.tokenizer)
        if PROFILES[profile].id_space == "raw":
            return self.raw[name], RAW_VOCABULARY
        if name not in self.mapped:
            self.mapped[name] = as_hashed(self.raw[name], PROFILES[profile], tokenizer=self.tokenizer)
        return self.mapped[name]


def one_run(
    texts: Texts,
    *,
    group: str,
    text: str,
    profile: str,
    slots: int,
    layer: int = 1,
    tokens: int = MILLION,
    warm_up: float = 0.5,
    prefill: int = 0,
    entry: str = "row",
    heads: int = 8,
    shuffle: bool = True,
    after: str | None = None,
) -> dict:
    started = time.process_time()
    requests, vocab_size = texts.of(text, profile)
    requests = cut(requests.shuffled(SEED) if shuffle else requests, tokens)
    if after is not None:
        earlier = cut(texts.of(after, profile)[0].shuffled(SEED), MILLION)
        warm_up = len(earlier.ids_T) / (len(earlier.ids_T) + len(requests.ids_T))
        requests = joined(earlier, requests)
    requests = replace(requests, prompt_Q=np.full_like(requests.prompt_Q, prefill))
    shipped, chosen = SHIPPED[profile], PROFILES[profile].replace(heads=heads)
    schemes = resolve(
        chosen,
        vocab_size=vocab_size,
        layers=shipped.layers,
        fill_id=shipped.pad_id,
        eos_ids=(EOS,) if "eos" in chosen.stop else (),
    )
    found = simulate(
        requests,
        next(scheme for scheme in schemes if scheme.layer == layer),
        bytes_per_row=BYTES_PER_ROW[profile] * (8 // heads),
        slots=slots,
        budgets=BUDGETS,
        # policies cost a pass for every size; long streams are there for their limit
        policies=("pinned",) if group in ("length", "other text") else ("lfu", "tinylfu", "pinned"),
        entry=entry,
        warm_up=warm_up,
    )
    told = as_dict(found)
    for cache in told["caches"].values():
        points = cache.pop("curve")[::2]
        cache["curve"] = {name: [_short(point[name]) for point in points] for name in points[0]}
        cache["at"] = [_short(point) for point in cache["at"]]
        for name in ("needed", "needed_static"):
            cache[name] = {str(target): n_bytes for target, n_bytes in cache[name].items()}
    return {
        "requests": len(requests),
        "vocab_size": vocab_size,
        "file": requests.name,
        **told,
        "warm_up": warm_up,
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def _short(value):
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    return round(value, 5) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--groups", nargs="*", help="only these groups of runs")
    given = parser.parse_args()
    texts = Texts(given.data, given.tokenizer)
    told = {"runs": []}
    if given.out.exists():
        told = json.loads(given.out.read_text())
    done = [run["settings"] for run in told["runs"]]
    for settings in runs():
        if settings in done or (given.groups and settings["group"] not in given.groups):
            continue
        found = one_run(texts, **settings)
        told["circumstances"] = circumstances("numpy", "numba", "tokenizers")
        told["circumstances"]["peak_memory_bytes"] = max(
            peak_memory_bytes(), told["circumstances"].get("peak_memory_bytes", 0)
        )
        told["seed"] = SEED
        told["runs"].append({"settings": settings, **found})
        beside = given.out.with_suffix(".part")
        beside.write_text(json.dumps(told, separators=(",", ":")) + "\n")
        beside.replace(given.out)
        shared = found["caches"]["all"]
        print(
            *settings.values(),
            f"{shared['reads']:,} reads, limit {shared['limit']:.3f}, {found['cpu_seconds']} s",
        )


if __name__ == "__main__":
    main()
