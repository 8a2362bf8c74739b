"""Caches played over a stream of reads: reuse distances for LRU of every size at once, and two frequency policies.

Reuse distance of a read = how many different entries were read since the last read of the same one. An LRU cache of C
entries holds the entry exactly if distance < C, so one pass answers for every C (Mattson et al. 1970). The distance is
counted as Bennett and Kruskal (1975) do: a bit for each read that is still the last one of its entry; the bits
behind the previous read are summed by a Fenwick tree over words of 64 bits, N log(N / 64) altogether.

`lfu_hits`      LFU with dynamic aging (Arlitt et al. 2000): key = times read while held + age; the lowest key goes, of
                equal ones the one read longest ago; age becomes the key of what last went. Every miss is admitted.
`tinylfu_hits`  LRU behind a TinyLFU admission (Einziger et al. 2017) without window or sketch: exact counts of every
                entry ever read, all halved every 10 C reads. A miss replaces the LRU's last entry only if its count,
                this read included, is higher.

Twins in plain Python are in `tests/cachesim/test_simulate.py`. Dimension letters: N reads, E entries, Q requests, T tokens in
the order served, C columns, G groups (orders).
"""

import numpy as np

from engram_lm.kernels.bits import ones
from engram_lm.kernels.compiled import kernel

# Reads between two halvings of TinyLFU's counts, for each entry that the cache holds.
TINYLFU_PERIOD = 10
# A count shifted by this or more is 0.
_ALL_BITS = 31


@kernel
def serve(tokens_Q, prompt_Q, slots, token_T, step_T):
    """The order in which a server with `slots` slots reads the tokens of requests that lie one after another.

    A free slot takes the next request and reads its first max(1, prompt) tokens in one step, then one token a step.
    Within a step, slots come in their order. Writes the token's place and its step. Returns the number of steps, and how
    many of them come before the first in which a slot finds no request.
    """
    next_S = np.zeros(slots, dtype=np.int64)
    end_S = np.zeros(slots, dtype=np.int64)
    at = step = queue = start = 0
    full = -1
    while at < token_T.shape[0]:
        for s in range(slots):
            chunk = 1
            if next_S[s] == end_S[s]:
                if queue == tokens_Q.shape[0]:
                    full = step if full < 0 else full
                    continue
                next_S[s] = start
                start += tokens_Q[queue]
                end_S[s] = start
                chunk = max(1, min(prompt_Q[queue], tokens_Q[queue]))
                queue += 1
            for _ in range(chunk):
                token_T[at] = next_S[s]
                step_T[at] = step
                next_S[s] += 1
                at += 1
        step += 1
    return step, step if full < 0 else full


@kernel
def merge_reads(entry_CL, token_T, step_T, group_C, n_entries, entry_N, group_N, reads_K):
    """The reads of every step, each entry once, in order of first appearance: token by token, column by column.

    entry_CL: the entries of the tokens as they lie in the file. reads_K: reads of each step. Returns all reads.
    """
    last_E = np.full(n_entries, -1, dtype=np.int32)
    n = 0
    for t in range(token_T.shape[0]):
        for c in range(group_C.shape[0]):
            e = entry_CL[c, token_T[t]]
            if last_E[e] != step_T[t]:
                last_E[e] = step_T[t]
                entry_N[n] = e
                group_N[n] = group_C[c]
                reads_K[step_T[t]] += 1
                n += 1
    return n


@kernel
def lru_distances(entry_N, n_entries, distance_N):
    """The reuse distance of every read, -1 for the first of an entry. int32; up to 2^31 reads."""
    last_E = np.full(n_entries, -1, dtype=np.int32)
    n_words = entry_N.shape[0] // 64 + 1
    # One bit a read: it is the last read of its entry so far.
    live_W = np.zeros(n_words, dtype=np.uint64)
    # Fenwick sums of finished words; the word that reads are written to joins when it is full.
    sum_W = np.zeros(n_words + 1, dtype=np.int32)
    n_live = 0
    one = np.uint64(1)
    for i in range(entry_N.shape[0]):
        here = i >> 6
        if i & 63 == 0 and i > 0:
            w = here
            full = ones(live_W[here - 1])
            while w <= n_words:
                sum_W[w] += full
                w += w & -w
        e = entry_N[i]
        p = last_E[e]
        if p < 0:
            distance_N[i] = -1
            n_live += 1
        else:
            w = p >> 6
            bit = one << np.uint64(p & 63)
            # Bits up to and including p: everything else was read since.
            seen = ones(live_W[w] & (bit | (bit - one)))
            live_W[w] ^= bit
            u = w
            while u > 0:
                seen += sum_W[u]
                u -= u & -u
            distance_N[i] = n_live - seen
            if w < here:
                u = w + 1
                while u <= n_words:
                    sum_W[u] -= 1
                    u += u & -u
        live_W[here] |= one << np.uint64(i & 63)
        last_E[e] = i


@kernel
def count_distances(distance_N, group_N, group, first, count_E):
    """count_E[d] += 1 for every read from `first` on that is of `group` (any if -1) and has distance d, not -1."""
    for i in range(first, distance_N.shape[0]):
        if distance_N[i] >= 0 and (group < 0 or group_N[i] == group):
            count_E[distance_N[i]] += 1


@kernel
def longest_of_steps(distance_N, reads_K, never, longest_K):
    """The longest distance in every step: the LRU cache that has no miss there holds more. `never`: a first read."""
    i = 0
    for k in range(reads_K.shape[0]):
        longest = -1
        for _ in range(reads_K[k]):
            d = distance_N[i]
            longest = max(longest, never if d < 0 else d)
            i += 1
        longest_K[k] = longest


@kernel
def lfu_hits(entry_N, n_entries, capacity, first):
    """Hits among the reads from `first` on, LFU with dynamic aging."""
    # 0: not held.
    key_E = np.zeros(n_entries, dtype=np.int32)
    count_E = np.zeros(n_entries, dtype=np.int32)
    newer_E = np.full(n_entries, -1, dtype=np.int32)
    older_E = np.full(n_entries, -1, dtype=np.int32)
    # Lists of equal keys. Keys never exceed the number of reads: each adds reads of its own stay to those of others'.
    newest_K = np.full(entry_N.shape[0] + 2, -1, dtype=np.int32)
    oldest_K = np.full(entry_N.shape[0] + 2, -1, dtype=np.int32)
    held = hits = age = 0
    lowest = 1
    for i in range(entry_N.shape[0]):
        e = entry_N[i]
        gone = -1
        if key_E[e] > 0:
            hits += i >= first
            gone = e
        elif held == capacity:
            while oldest_K[lowest] < 0:
                lowest += 1
            age = lowest
            gone = oldest_K[lowest]
        else:
            held += 1
        if gone >= 0:
            k, a, b = key_E[gone], newer_E[gone], older_E[gone]
            if a >= 0:
                older_E[a] = b
            else:
                newest_K[k] = b
            if b >= 0:
                newer_E[b] = a
            else:
                oldest_K[k] = a
            key_E[gone] = 0
            if gone != e:
                count_E[gone] = 0
        count_E[e] += 1
        k = count_E[e] + age
        key_E[e] = k
        newer_E[e] = -1
        older_E[e] = newest_K[k]
        if newest_K[k] >= 0:
            newer_E[newest_K[k]] = e
        else:
            oldest_K[k] = e
        newest_K[k] = e
    return hits


@kernel
def tinylfu_hits(entry_N, n_entries, capacity, first):
    """Hits among the reads from `first` on, LRU behind a TinyLFU admission."""
    count_E = np.zeros(n_entries, dtype=np.int32)
    # The period that count_E was last brought up to date in: halving happens when an entry is looked at.
    period_E = np.zeros(n_entries, dtype=np.int32)
    held_E = np.zeros(n_entries, dtype=np.bool_)
    # A ring through entry n_entries, which stands for both ends.
    end = n_entries
    newer_E = np.full(n_entries + 1, end, dtype=np.int32)
    older_E = np.full(n_entries + 1, end, dtype=np.int32)
    held = hits = 0
    for i in range(entry_N.shape[0]):
        e = entry_N[i]
        period = i // (TINYLFU_PERIOD * capacity)
        count_E[e] = (count_E[e] >> min(period - period_E[e], _ALL_BITS)) + 1
        period_E[e] = period
        gone = -1
        if held_E[e]:
            hits += i >= first
            gone = e
        elif held == capacity:
            last = newer_E[end]
            if count_E[e] <= count_E[last] >> min(period - period_E[last], _ALL_BITS):
                continue
            gone = last
        else:
            held += 1
        if gone >= 0:
            older_E[newer_E[gone]] = older_E[gone]
            newer_E[older_E[gone]] = newer_E[gone]
            held_E[gone] = False
        held_E[e] = True
        older_E[e] = older_E[end]
        newer_E[e] = end
        newer_E[older_E[end]] = e
        older_E[end] = e
    return hits
