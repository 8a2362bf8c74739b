"""A deleted document answers nowhere once a snapshot was taken anew: not in drafts, session, chosen documents or memos."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engram_lm.bases.recipes import Recipe, build_model, byte_tokenizer  # noqa: E402
from engram_lm.generation import Drafts, speculate  # noqa: E402
from engram_lm.generation.speculative import Drafter  # noqa: E402
from engram_lm.library import Library, Text  # noqa: E402
from engram_lm.library.verbatim import verbatim_runs  # noqa: E402
from engram_lm.mixing import FixedLambda, SessionMemory, memory_processor, rules_of  # noqa: E402
from engram_lm.mixing.gate import LookupConfig  # noqa: E402

RECIPE = Recipe(
    name="doll", vocab_size=258, hidden_size=32, layers=1, heads=2, key_value_heads=1, intermediate_size=32
)
KEPT, SECRET = "The canteen opens at eight. " * 30, "The vault code is nine four seven quokka. " * 40
WAYS = ("tokens", "documents", "sources")


@pytest.fixture(scope="module")
def base():
    tokenizer = byte_tokenizer()
    return build_model(RECIPE, tokenizer=tokenizer).eval(), tokenizer


@pytest.fixture(scope="module")
def never(base, tmp_path_factory):
    """A library that never held the secret."""
    library = Library.create(tmp_path_factory.mktemp("never") / "i", tokenizer=base[1], merging="by hand")
    library.add([Text(id="kept", text=KEPT, source="x")])
    library.add([Text(id="kept too", text=KEPT[7:], source="x")])
    yield library
    library.store.close()


@pytest.fixture
def library(base, tmp_path):
    with Library.create(tmp_path / "i", tokenizer=base[1], merging="by hand") as library:
        library.add([Text(id="kept", text=KEPT, source="x"), Text(id="secret", text=SECRET, source="x")])
        library.add([Text(id="kept too", text=KEPT[7:], source="x")])
        yield library


def told(library, base):
    """What a request is told after a wording of the secret, in every way, and again, as a thread remembers."""
    model, tokenizer = base
    snapshot, ids = library.store.snapshot(), library.encoder.encode("The vault code is nine ")
    rules, found = rules_of(tokenizer, model, snapshot), []
    for _ in range(2):
        for count in WAYS:
            found.append(snapshot.distribution(ids, count=count).p)
            found.append(snapshot.score(ids, count=count).p)
        gate = FixedLambda(0.9, reading=LookupConfig(count="documents"))
        for session in ("off", 512):
            said = speculate(
                model, ids, snapshot, gate, rules=rules, max_new_tokens=8, session=session, worth=0.05
            )
            found.append(said.tokens)
            processor = memory_processor(
                snapshot, gate, torch.tensor(ids)[None], rules=rules, session=session
            )
            found.append(Drafter(processor, most=8, worth=0.01).guess(ids, 8))
            drafts = Drafts(processor)
            out = model.generate(
                torch.tensor(ids)[None], logits_processor=[processor], custom_generate=drafts, max_new_tokens=6,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
            found.append(out.tolist())
        found.append(SessionMemory(snapshot, 256, given=len(ids)).extended(ids).distribution(ids).p)
        found.append([(one.id, count) for one, count in snapshot.documents_of(snapshot.match(ids), 1)])
        found.append(
            [run.length for run in verbatim_runs(snapshot, library.encoder.encode(SECRET[:60]), shortest=4)]
        )
        found.append(library.search("vault code")[0])
        found.append([one.text for one in library.explain("The vault code is").continuations])
    return found


def same(a, b):
    """Equal; probabilities up to rounding, as an interval with deleted places may be counted in another order."""
    return len(a) == len(b) and all(
        np.allclose(x, y, rtol=1e-5, atol=1e-9) if isinstance(x, np.ndarray) else x == y
        for x, y in zip(a, b, strict=True)
    )


def test_after_delete_every_answer_is_that_of_an_index_that_never_had_it(base, library, never):
    before = told(library, base)
    assert before[-2] > 0
    reader = Library.open(library.store.directory, tokenizer=base[1])
    assert same(told(reader, base), before)
    library.delete(["secret"])
    # in two segments where the other has them in two as well; the words of the deleted one lie in the file still
    wanted = told(never, base)
    assert not same(wanted, before)
    assert same(told(library, base), wanted)
    assert same(told(reader, base), wanted)
    library.store.purge()
    assert same(told(library, base), wanted)
    assert same(told(reader, base), wanted)
    reader.store.close()


def test_documents_chosen_for_a_question_forget_too(base, library):
    pytest.importorskip("bm25s")
    question = "What is the vault code of the quokka?"
    assert library.chosen(question, 1)[0].id == "secret"
    assert library.focus(question, ["secret"])
    words = set(library.chooser().words)
    library.delete(["secret"])
    assert "secret" not in [one.id for one in library.chosen(question, 3)]
    assert len(library.chooser().words) == len(words) - 1
    assert "quokka" not in library.chooser().vocabulary
    with pytest.raises(ValueError, match="no document 'secret'"):
        library.focus(question, ["secret"])


def test_a_call_that_began_before_keeps_its_generation_and_the_next_does_not(base, library):
    """A snapshot never changes: what runs is ended or goes on as it began; a server takes a new one for every request."""
    ids = library.encoder.encode("The vault code is nine ")
    old = library.store.snapshot()
    session = SessionMemory(old, 64, given=len(ids))
    library.delete(["secret"])
    assert session.extended(ids).longest(ids)[0] == len(ids)
    new = SessionMemory(library.store.snapshot(), 64, given=len(ids)).extended(ids)
    assert new.longest(ids)[0] < len(ids)
    assert np.array_equal(new.views[0].segment.tokens, old.views[0].segment.tokens)
