"""Session memory against a plain look at the tokens so far: what it finds, what it must not, and who sees it."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import ConfigError
from engram_lm.index.segment import Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot
from engram_lm.mixing import FixedLambda, SessionMemory, memory_processor
from engram_lm.mixing.lookups import read_next
from engram_lm.mixing.mix import TokenRules, mix_plain
from models import EOS, PAD, build

V = 258
RULES = TokenRules(n_tokens=V, n_logits=V, silent=(PAD, EOS), eos_id=EOS)


def a_snapshot(documents, vocab_size):
    return Snapshot([LiveSegment(Segment.build(documents, vocab_size=vocab_size))], vocab_size=vocab_size)


def events(documents, said, *, end, eos):
    """(tokens before, token that followed) of everything that happened, of documents and of a conversation."""
    found = [
        ([*document, end][:i], [*document, end][i])
        for document in documents
        for i in range(len(document) + 1)
    ]
    piece = []
    for token in said:
        if not 0 <= token < end:
            piece = []
        elif token == eos:
            found.append((piece, end))
            piece = []
        else:
            found.append((piece, token))
            piece = [*piece, token]
    return found


def followed(found, context, order):
    gram = context[len(context) - order :]
    return Counter(
        token for before, token in found if len(before) >= order and before[len(before) - order :] == gram
    )


def chain(found, context, most, size, discount):
    p, depth = np.full(size, 1 / size), 0
    for order in range(min(len(context), most) + 1):
        counts = followed(found, context, order)
        total = sum(counts.values())
        if not total:
            break
        depth, c = order, np.array([counts[x] for x in range(size)], float)
        p = np.maximum(c - discount, 0) / total + discount * len(counts) / total * p
    return p, depth


@settings(max_examples=60)
@given(st.data())
def test_it_says_what_a_plain_look_at_the_tokens_says(data):
    size = data.draw(st.sampled_from([2, 4, 30]))
    eos = data.draw(st.sampled_from([None, 0]))
    token = st.integers(0, size + (eos is not None))  # one or two ids that the index does not have
    documents = data.draw(st.lists(st.lists(st.integers(0, size - 1), max_size=6), max_size=3))
    ids = np.array(data.draw(st.lists(token, max_size=70)), np.int64)
    cap, block = data.draw(st.integers(1, 80)), data.draw(st.sampled_from([1, 5]))
    given_tokens = data.draw(st.integers(0, len(ids)))
    base = a_snapshot(documents, size)
    session = SessionMemory(base, cap=cap, given=given_tokens, block=block, eos_id=eos)
    said = session.findable(ids).tolist()
    n = len(ids) if block == 1 else given_tokens + (len(ids) - given_tokens) // block * block
    assert said == ids[max(0, n - cap) : n].tolist()
    snapshot = session.extended(ids)
    found = events(documents, said, end=size, eos=eos)
    context = [size if token == eos else token for token in ids.tolist()]
    # contexts end where a document did, and at ids that are not of the index
    stop = max((i + 1 for i, token in enumerate(context) if token >= size), default=0)
    context = context[stop:]
    wanted, depth = chain(found, context, 64, size + 1, 0.75)
    if not found:
        assert snapshot.n_tokens == 0
        return
    got = snapshot.distribution(np.where(ids == eos, size, ids))
    assert got.depth == depth
    np.testing.assert_allclose(got.p, wanted, atol=1e-6)
    order, tokens, counts = snapshot.longest(np.where(ids == eos, size, ids))
    assert order == depth
    assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == followed(found, context, depth)
    assert snapshot.n_tokens == len(found)


def test_the_context_does_not_find_itself():
    ids = np.random.default_rng(0).permutation(200)
    snapshot = SessionMemory(Snapshot([], vocab_size=V), block=1).extended(ids)
    assert snapshot.longest(ids)[0] == 0
    again = np.concatenate([ids, ids[50:60]])
    order, tokens, counts = SessionMemory(Snapshot([], vocab_size=V), block=1).extended(again).longest(again)
    assert (order, tokens.tolist(), counts.tolist()) == (10, [ids[60]], [1])
    # one token over and over: found at every length but the whole
    same = np.full(40, 7)
    order, tokens, counts = SessionMemory(Snapshot([], vocab_size=V), block=1).extended(same).longest(same)
    assert (order, tokens.tolist(), counts.tolist()) == (39, [7], [1])


@pytest.mark.parametrize("cap", [16, 300, 12_000])
def test_the_cap_holds_in_tokens_and_bytes(cap):
    rng = np.random.default_rng(cap)
    base = Snapshot([], vocab_size=V)
    session = SessionMemory(base, cap=cap, kept=2, eos_id=EOS)
    for ids in (
        rng.integers(2, V, 3 * cap),
        np.full(3 * cap, EOS),
        np.full(3 * cap, 5),
        rng.integers(-1, 400, 3 * cap),
    ):
        snapshot = session.extended(ids)
        assert snapshot.n_tokens <= cap
        segment = snapshot.views[-1].segment
        assert sum(array.nbytes for array in segment.arrays.values()) + 8 * (V + 1) <= session.most_bytes
    assert len(session._known) == 2
    old = rng.integers(2, V, 30)
    snapshot = session.extended(np.concatenate([old, np.full(cap + 40, 9)]))
    assert snapshot.match(old[:5]).depth == 0


def test_it_is_told_as_this_conversation_and_costs_the_index_nothing():
    base = a_snapshot([[5, 6, 7, 8]], V)
    ids = np.array([20, 21, 22, 23, 20, 21])
    snapshot = SessionMemory(base, given=6).extended(ids)
    match = snapshot.match(ids)
    assert [(document.id, n) for document, n in snapshot.documents_of(match, match.depth)] == [
        ("this conversation", 1)
    ]
    assert base.n_tokens == 5
    assert base.match(ids).depth == 0
    assert SessionMemory(base).extended(ids) is base  # nothing given, and no whole block yet


@pytest.mark.parametrize("wrong", [{"cap": 0}, {"cap": "on"}, {"block": 0}, {"given": -1}, {"cap": True}])
def test_refusals(wrong):
    with pytest.raises(ConfigError, match="of a session memory is a whole number from"):
        SessionMemory(Snapshot([], vocab_size=V), **wrong)


# ---- in generate ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return build("llama", torch.float64)


def two_prompts():
    """A phrase that comes back in each, of unequal lengths, padded on the left; a phrase of the first begins the second."""
    rng = np.random.default_rng(3)
    phrase, other = rng.integers(2, V, 8), rng.integers(2, V, 8)
    a, b = np.concatenate([phrase, [40], phrase[:4]]), np.concatenate([other, phrase[:3]])
    ids = np.full((2, len(a)), PAD)
    ids[0], ids[1, len(a) - len(b) :] = a, b
    return torch.tensor(ids), torch.tensor((ids != PAD).astype(np.int64)), [a, b], phrase


def by_hand(model, snapshot, context, given_tokens, lam, cap):
    """log P of the mixture, the session taken as one more document."""
    with torch.no_grad():
        logits = model(torch.tensor(np.asarray(context))[None]).logits[0, -1].float().numpy()
    seen = SessionMemory(snapshot, cap, given=given_tokens, eos_id=EOS).extended(np.array(context))
    q, _ = read_next(
        seen, np.array(context), RULES, FixedLambda(lam).reading, out=np.empty(V + 1, np.float32)
    )
    return mix_plain(logits, q, lam=lam)


@pytest.mark.parametrize("documents", [[], [[3, 4, 5, 6, 7, 8, 9]]])
def test_rows_of_a_batch_remember_their_own_words(model, documents):
    snapshot = a_snapshot(documents, V) if documents else Snapshot([], vocab_size=V)
    ids, mask, texts, phrase = two_prompts()
    processor = memory_processor(snapshot, FixedLambda(0.9), ids, mask, rules=RULES, session=24)
    out = model.generate(
        ids, attention_mask=mask, logits_processor=[processor], max_new_tokens=36, do_sample=False
    )
    for row, text in enumerate(texts):
        context = text.tolist()
        for token in out[row, ids.shape[1] :].tolist():
            assert token == by_hand(model, snapshot, context, len(text), 0.9, 24).argmax()
            context.append(token)
    assert out[0, ids.shape[1] : ids.shape[1] + 4].tolist() == phrase[4:].tolist()
    # the first prompt's phrase is not known to the second
    steps = processor.steps(out)
    assert steps[0][0].depth == 4
    assert steps[1][0].depth == 0


def test_another_rows_words_change_no_bit(model):
    ids, mask, texts, _ = two_prompts()
    logits = torch.randn(2, V)
    snapshot = a_snapshot([[3, 4, 5]], V)
    both = memory_processor(snapshot, FixedLambda(0.5), ids, mask, rules=RULES, session=4096)(ids, logits)
    for row in range(2):
        one = torch.tensor(texts[row])[None]
        alone = memory_processor(snapshot, FixedLambda(0.5), one, rules=RULES, session=4096)
        assert torch.equal(alone(one, logits[row : row + 1])[0], both[row])


def test_off_is_the_index_alone_bit_for_bit(model):
    ids, mask, _, _ = two_prompts()
    snapshot, logits = a_snapshot([ids[0, 5:].tolist()], V), torch.randn(2, V)
    plain = memory_processor(snapshot, FixedLambda(0.5), ids, mask, rules=RULES)(ids, logits)
    off = memory_processor(snapshot, FixedLambda(0.5), ids, mask, rules=RULES, session="off")(ids, logits)
    on = memory_processor(snapshot, FixedLambda(0.5), ids, mask, rules=RULES, session=64)(ids, logits)
    assert torch.equal(plain, off)
    assert not torch.equal(plain, on)


def test_beams_have_what_each_of_them_said(model):
    ids, mask, texts, _ = two_prompts()
    snapshot = a_snapshot([[3, 4, 5]], V)
    processor = memory_processor(snapshot, FixedLambda(0.6), ids, mask, rules=RULES, session=4096)
    out = model.generate(
        ids, attention_mask=mask, logits_processor=[processor], num_beams=3, max_new_tokens=34, do_sample=False,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for row, text in enumerate(texts):
        context, total = text.tolist(), 0.0
        for token in out.sequences[row, ids.shape[1] :].tolist():
            total += by_hand(model, snapshot, context, len(text), 0.6, 4096)[token]
            context.append(token)
        assert float(out.sequences_scores[row]) == pytest.approx(total, abs=2e-3)
