"""infini-gram 2.6.0 on the tokens of `index.py`: asked the same questions, one call at a time, at several settings.

Run by a Python that has it; it does not import engram_lm:

    python3 -m venv peer && peer/bin/pip install infini-gram==2.6.0 numpy
    ENGRAM_INFINI_GRAM_PYTHON=peer/bin/python make bench-index

    peer_infini_gram.py INDEX QUESTIONS.npz OUT.npz      # the last line is JSON

QUESTIONS.npz: token_QK int32, length_Q, and check_QC: tokens (-1: none) whose count after the longest suffix is asked for
one by one. "default" is the engine as it comes; the others load the index into memory and change how far it prefetches.

It looks at `max_support` = 1,000 continuations of a context and samples the rest; these answers say "approx". With the limit
lifted it starts a thread for every branch of its search, and ends the process when there are no more (30,000 here).
"""

import json
import sys
import time

import numpy as np
from infini_gram.engine import InfiniGramEngine

END = 49_152  # above every token of the text; the separator in its files is 65,535
SETTINGS = {
    "default": {},
    "in memory": {"load_to_ram": True},
    "in memory, no prefetch": {
        "load_to_ram": True,
        "ds_prefetch_depth": 0,
        "sa_prefetch_depth": 0,
        "od_prefetch_depth": 0,
    },
    "no prefetch": {"ds_prefetch_depth": 0, "sa_prefetch_depth": 0, "od_prefetch_depth": 0},
}


def engine(index, **settings):
    return InfiniGramEngine(
        index_dir=index, eos_token_id=END, vocab_size=END + 1, token_dtype="u16", **settings
    )


def microseconds(call, queries):
    spent = []
    for ids in queries:
        start = time.perf_counter_ns()
        call(ids)
        spent.append((time.perf_counter_ns() - start) / 1e3)
    return {
        "p50_us": float(np.median(spent)),
        "p90_us": float(np.percentile(spent, 90)),
        "p99_us": float(np.percentile(spent, 99)),
        "mean_us": float(np.mean(spent)),
        "calls": len(spent),
    }


def main():
    index, asked, out = sys.argv[1:4]
    given = np.load(asked)
    queries = [given["token_QK"][q, :n].tolist() for q, n in enumerate(given["length_Q"])]
    found = {"settings": {}}
    for name, settings in SETTINGS.items():
        asking = engine(index, **settings)
        sample = queries[: len(queries) // 2]
        microseconds(asking.infgram_ntd, sample)
        found["settings"][name] = {
            "given": settings,
            "longest_suffix": microseconds(asking.infgram_ntd, sample),
        }
        del asking
    asking = engine(index, load_to_ram=True)
    # one position of a prompt: the probability of its token after the longest suffix that occurs
    prompts = [ids for ids in queries if len(ids) > 1]
    found["position"] = microseconds(lambda ids: asking.infgram_prob(ids[:-1], ids[-1]), prompts)
    lengths, totals, sampled, tokens, counts, starts, checked = [], [], [], [], [], [0], []
    for ids, check in zip(queries, given["check_QC"].tolist(), strict=True):
        answer = asking.infgram_ntd(ids)
        pairs = sorted((token, one["cont_cnt"]) for token, one in answer["result_by_token_id"].items())
        lengths.append(answer["suffix_len"])
        totals.append(answer["prompt_cnt"])
        sampled.append(answer["approx"])
        tokens += [token for token, _ in pairs]
        counts += [count for _, count in pairs]
        starts.append(len(tokens))
        suffix = ids[len(ids) - answer["suffix_len"] :]
        checked.append([asking.count([*suffix, token])["count"] if token >= 0 else -1 for token in check])
    np.savez(
        out,
        length=lengths,
        total=totals,
        sampled=sampled,
        token=tokens,
        count=counts,
        start=starts,
        checked=checked,
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
