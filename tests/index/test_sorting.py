"""Sorted contexts and heavy intervals: compiled against the plain twins, for texts made to be slow or wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.index import sorting
from engram_lm.index.kernels import sorting as kernel
from engram_lm.index.sorting import context_order, nodes_of, nodes_plain, sort_contexts, wide_intervals


def stream(documents, end, dtype):
    return np.array([token for document in documents for token in (*document, end)], dtype)


def require_sorted(tokens_N, end, **options):
    order_N, first_V = sort_contexts(tokens_N, vocab_size=end, **options)
    wanted_N = context_order(tokens_N, end) if len(tokens_N) else np.empty(0, np.int64)
    assert order_N.dtype == np.uint32
    assert np.array_equal(order_N, wanted_N)
    last_N = np.concatenate([[end], tokens_N[:-1]])[wanted_N].astype(np.int64) if len(tokens_N) else wanted_N
    last_N[last_N == end] = -1
    assert np.array_equal(first_V, np.searchsorted(last_N, np.arange(end + 1)))
    return order_N


texts = st.lists(st.lists(st.integers(0, 3), max_size=40), max_size=8)


@settings(max_examples=150, deadline=None)
@given(documents=texts, copies=st.integers(1, 3), dtype=st.sampled_from([np.uint16, np.uint32]))
def test_any_text_is_sorted_as_by_the_plain_twin(documents, copies, dtype):
    require_sorted(stream(documents * copies, 4, dtype), 4)


@settings(max_examples=60, deadline=None)
@given(documents=texts, copies=st.integers(1, 3))
def test_short_of_levels_ranks_do_the_rest(documents, copies):
    tokens_N = stream(documents * copies, 4, np.uint16)
    first_V = np.empty(5, np.uint32)
    order_N = kernel.by_last_token(tokens_N, 4, first_V)
    depth, tied = kernel.refine(tokens_N, order_N, 0, len(tokens_N), 4, 0)
    while tied:
        depth, tied = kernel.double(order_N, depth, 2)
    wanted_N = context_order(tokens_N, 4) if len(tokens_N) else []
    assert np.array_equal(order_N, wanted_N)


def adversarial():
    rng = np.random.default_rng(0)
    chapter = rng.integers(0, 500, 3000).tolist()
    fibonacci = [[0], [0, 1]]
    while len(fibonacci[-1]) < 4000:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    return {
        "one token": [[7] * 5000],
        "two tokens in turn": [[3, 9] * 2500],
        "a long period": [rng.integers(0, 50, 97).tolist() * 60],
        "the same document": [chapter] * 5,
        "the same beginnings and endings": [chapter[:n] for n in (3000, 100, 2999, 1, 64, 65, 66)]
        + [chapter[n:] for n in (1, 64, 65, 66, 2999)],
        "empty documents": [[]] * 5000,
        "documents of one token": [[i % 3] for i in range(5000)],
        "fibonacci": [fibonacci[-1]],
        "nothing": [],
        "the largest token": [[499, 498, 499] * 300, [499] * 200],
    }


@pytest.mark.parametrize("name", adversarial())
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_texts_made_to_be_slow(name, dtype):
    require_sorted(stream(adversarial()[name], 500, dtype), 500)


def test_the_largest_vocabularies_fit_their_keys():
    for dtype, end in ((np.uint16, 65_535), (np.uint32, 70_000)):
        top = end - 1
        require_sorted(stream([[top, 0, top, top], [0, 0, top], [top] * 9, [0] * 9], end, dtype), end)


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(sorting, "_WORTH_A_THREAD", 0)
    rng = np.random.default_rng(1)
    documents = [rng.zipf(1.4, n) % 300 for n in (4000, 1, 0, 3000)]
    documents += [documents[0][500:], np.full(700, 5)]
    for threads in (1, 2, 5):
        require_sorted(stream(documents, 300, np.uint16), 300, threads=threads)


@pytest.mark.slow
def test_a_million_tokens_of_repeats():
    rng = np.random.default_rng(2)
    book = rng.zipf(1.2, 150_000) % 40_000
    documents = [book, book[1000:], np.full(200_000, 3), np.tile(book[:5000], 40), book[::-1], book]
    require_sorted(stream(documents, 40_000, np.uint16), 40_000, threads=2)


# ---- heavy intervals ------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    documents=texts,
    copies=st.integers(1, 3),
    wide=st.sampled_from([1, 2, 5]),
    more=st.sampled_from([0, 3]),
    most_order=st.sampled_from([0, 1, 3, 64]),
)
def test_heavy_intervals_are_those_of_the_plain_twin(documents, copies, wide, more, most_order):
    tokens_N = stream(documents * copies, 4, np.uint16)
    order_N, _ = sort_contexts(tokens_N, vocab_size=4)
    next_N = tokens_N[order_N]
    node_H2 = wide_intervals(tokens_N, order_N, end=4, wide=wide, most_order=most_order)
    heavy, found = nodes_of(node_H2, next_N, end=4, heavy=wide + more)
    assert heavy == wide + more
    wanted = nodes_plain(tokens_N, order_N, next_N, end=4, heavy=heavy, wide=wide, most_order=most_order)
    keys = list(zip(found["node_low"].tolist(), found["node_high"].tolist(), strict=True))
    assert keys == sorted(wanted, key=lambda node: (node[0], -node[1]))
    for h, key in enumerate(keys):
        part = slice(found["node_at"][h], found["node_at"][h + 1])
        listed = dict(
            zip(found["node_token"][part].tolist(), found["node_count"][part].tolist(), strict=True)
        )
        assert (found["node_distinct"][h], listed) == wanted[key]
        assert sorted(listed) == list(listed)


def test_counts_never_outgrow_the_text():
    # every interval of 0s is followed by as many tokens as it has positions
    rng = np.random.default_rng(3)
    tokens_N = stream(
        [np.concatenate([[0] * 60, [x]]) for x in rng.permutation(30_000)[:3000]], 30_000, np.uint16
    )
    order_N, _ = sort_contexts(tokens_N, vocab_size=30_000)
    node_H2 = wide_intervals(tokens_N, order_N, end=30_000, wide=64, most_order=64)
    heavy, found = nodes_of(node_H2, tokens_N[order_N], end=30_000, heavy=64)
    assert heavy > 64
    assert len(found["node_token"]) * 6 <= len(tokens_N) * 2
