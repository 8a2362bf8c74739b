"""Tenants do not see each other: whatever others add, delete and merge, one tenant's answers keep their bits.

Every answer in a store that others use too is compared with the answer in a store where nobody else ever was.
"""

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bm25s")

from engram_lm.bases.recipes import Recipe, build_model, byte_tokenizer  # noqa: E402
from engram_lm.generation import speculate  # noqa: E402
from engram_lm.generation.speculative import Drafter  # noqa: E402
from engram_lm.library import Library, Text  # noqa: E402
from engram_lm.mixing import FixedLambda, SessionMemory, memory_processor, rules_of, score  # noqa: E402
from engram_lm.mixing.gate import LookupConfig  # noqa: E402

RECIPE = Recipe(
    name="doll", vocab_size=258, hidden_size=32, layers=1, heads=2, key_value_heads=1, intermediate_size=32
)
WORDS = (
    "the", "office", "dog", "is", "called", "Orlando", "and", "sleeps", "beside", "desk", "while", "a", "cat", "named",
)  # fmt: skip
OURS, OTHERS = "acme", ("umbrella", "public", "acme ")
PROMPTS = ("the office dog is", "a cat named Bruno", "zzz")


@pytest.fixture(scope="module")
def base():
    tokenizer = byte_tokenizer()
    return build_model(RECIPE, tokenizer=tokenizer).eval(), tokenizer


def a_text(draw):
    """Words that all tenants use, so that another's document would change nearly every count."""
    return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 40)))


def change(draw, held, tenant):
    """One change of a tenant as (what, arguments), and what it holds then."""
    what = draw.choice(["add", "add", "add", "replace", "delete", "merge", "purge", "due"])
    names = sorted(held)
    if what in ("replace", "delete") and not names:
        what = "add"
    if what == "add":
        names = [f"{len(held)}-{draw.randrange(10**6)}" for _ in range(draw.randrange(1, 4))]
    elif what in ("replace", "delete"):
        names = draw.sample(names, 1)
    texts = [Text(id=name, text=a_text(draw), source=draw.choice(["", "x", "y"])) for name in names]
    held = (
        held - set(names)
        if what == "delete"
        else held | {text.id for text in texts if what in ("add", "replace")}
    )
    return (what, tenant, names, texts), held


def apply(library, made):
    what, tenant, names, texts = made
    if what in ("add", "replace"):
        library.add(texts, tenant=tenant, existing="replace")
    elif what == "delete":
        library.delete(names, tenant=tenant)
    elif what == "merge":
        library.store.merge(tenant)
    elif what == "due":
        library.store.merge(how="due")
    else:
        library.store.purge(tenant=tenant)


def bits(found):
    """All that a record holds, bit for bit."""
    return {name: np.asarray(value).tobytes() for name, value in vars(found).items()}


def answers(library, model, tokenizer, tenant, *, decoding):
    """Everything that a request of this tenant may be told."""
    snapshot, told = library.store.snapshot(tenant), []
    rules = rules_of(tokenizer, model, snapshot)
    for prompt in PROMPTS:
        ids = library.encoder.encode(prompt)
        for way in ({"count": "tokens"}, {"count": "documents"}, {"count": "sources"}):
            told += [bits(snapshot.distribution(ids, **way)), bits(snapshot.score(ids, **way))]
        match = snapshot.match(ids)
        told.append([(document.id, n) for document, n in snapshot.documents_of(match, match.depth)])
        logits = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 258)).astype(np.float32))
        gate = FixedLambda(0.5, reading=LookupConfig(count="documents"))
        for session in ("off", 64):
            processor = memory_processor(
                snapshot, gate, torch.tensor(ids)[None], rules=rules, session=session
            )
            told.append(processor(torch.tensor(ids)[None], logits).numpy().tobytes())
        told.append(Drafter(processor, most=8, worth=0.01).guess(ids, 8))
        session = SessionMemory(snapshot, 64, given=len(ids))
        told.append(bits(session.extended(ids).distribution(ids)))
        if snapshot.n_documents:
            told.append(library.chosen(prompt, 3, tenant=tenant))
        told.append(library.search(prompt, tenant=tenant)[0])
        if decoding:
            said = speculate(model, ids, snapshot, gate, rules=rules, max_new_tokens=8, worth=0.05)
            told.append((said.tokens, said.forwards, [step and step.p for step in said.steps]))
            told.append(bits(score(model, torch.tensor(ids), snapshot, gate, rules=rules)))
    return told


@pytest.mark.parametrize(
    ("seed", "steps"), [(0, 10), *(pytest.param(seed, 30, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_what_others_do_changes_no_bit_of_a_tenants_answers(base, tmp_path, seed, steps):
    draw, (model, tokenizer) = random.Random(seed), base
    held = dict.fromkeys((OURS, *OTHERS), frozenset())
    options = {"tokenizer": tokenizer, "merging": "by hand"}
    with (
        Library.create(tmp_path / "shared", **options) as shared,
        Library.create(tmp_path / "alone", **options) as alone,
        Library.open(tmp_path / "shared", tokenizer=tokenizer) as reader,
    ):
        last = None
        for step in range(steps):
            tenant = draw.choice([OURS, *OTHERS, *OTHERS])
            made, held[tenant] = change(draw, held[tenant], tenant)
            apply(shared, made)
            if tenant == OURS or made[0] == "due":
                apply(alone, made)
                last = None
            # what others ask fills what a thread and a library remember
            other = draw.choice(OTHERS)
            theirs = answers(shared, model, tokenizer, other, decoding=False)
            decoding = step % 8 == 7
            now = answers(shared, model, tokenizer, OURS, decoding=decoding)
            if last is None or decoding:
                last = answers(alone, model, tokenizer, OURS, decoding=decoding)
            assert now == last, (step, made[:3])
            if decoding or step + 1 == steps:
                assert answers(reader, model, tokenizer, OURS, decoding=decoding) == now
                last = None
            # what is compared does depend on documents
            assert theirs != now or not (held[other] or held[OURS])
        assert held[OURS]
        assert any(held[other] for other in OTHERS)


def test_a_request_of_several_tenants_sees_these_and_no_others(base, tmp_path):
    tokenizer = base[1]
    with Library.create(tmp_path / "i", tokenizer=tokenizer) as library:
        for tenant in ("a", "b", "c"):
            library.add([Text(id=tenant, text=f"the key of {tenant}")], tenant=tenant)
        both = library.store.snapshot(["a", "b"])
        ids = library.encoder.encode("the key of ")
        _, tokens, _ = both.longest(ids)
        assert library.encoder.decode(tokens) == "ab"
        assert both.n_documents == 2
