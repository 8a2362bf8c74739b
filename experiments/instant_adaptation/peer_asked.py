"""What infini-gram 2.6.0 says at every position of some texts. Run by a Python that has it; engram_lm is not imported.

peer_asked.py INDEX ASKED.npz ANSWERED.npz

ASKED: an array of ids a text, and `given`, how many of each stand before the first position asked. ANSWERED: integers_N
[T, 6] (length of the longest suffix, its count, distinct continuations, both for a suffix one shorter, the most frequent
continuation or -1), numbers_N [T, 3] (probability of the token that came, of the most frequent, entropy), ms a position.
"""

import sys
import time

import numpy as np
from infini_gram.engine import InfiniGramEngine

END = 49_152  # above every token of the text; the separator in its files is 65,535
MOST_CONTEXT = 64


def main():
    index, asked, out = sys.argv[1:4]
    engine = InfiniGramEngine(
        index_dir=index, eos_token_id=END, vocab_size=END + 1, token_dtype="u16", load_to_ram=True,
        ds_prefetch_depth=0, sa_prefetch_depth=0, od_prefetch_depth=0,
    )  # fmt: skip
    given = np.load(asked)
    found, spent, positions = {}, 0.0, 0
    for n, first in enumerate(given["given"].tolist()):
        ids = given[f"arr_{n}"].tolist()
        integers, numbers = [], []
        for t in range(first, len(ids)):
            begun = time.perf_counter()
            context = ids[max(0, t - MOST_CONTEXT) : t]
            answer = engine.infgram_ntd(context)
            depth, count = answer["suffix_len"], answer["prompt_cnt"]
            follows = {token: one["cont_cnt"] for token, one in answer["result_by_token_id"].items()}
            below = engine.ntd(context[len(context) - depth + 1 :]) if depth else answer
            total = sum(follows.values())
            p = {token: n / total for token, n in follows.items()} if total else {}
            top = max(sorted(p), key=p.get) if p else -1
            spent += time.perf_counter() - begun
            entropy = -sum(x * np.log(x) for x in p.values() if x > 0)
            integers.append(
                [depth, count, len(follows), below["prompt_cnt"], len(below["result_by_token_id"]), top]
            )
            numbers.append([p.get(ids[t], 0.0), p.get(top, 0.0), entropy])
        positions += len(integers)
        found[f"integers_{n}"], found[f"numbers_{n}"] = np.array(integers, np.int64), np.array(numbers)
    np.savez(out, ms=1e3 * spent / positions, positions=positions, **found)


if __name__ == "__main__":
    main()
