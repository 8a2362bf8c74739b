"""Documents chosen for questions: BM25 as bm25s and as its formula have it, passages, sentences, and what is refused."""

import builtins
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("bm25s")

from engram_lm.bases.recipes import byte_tokenizer
from engram_lm.errors import ConfigError, MissingExtraError
from engram_lm.index.segment import Document, Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot
from engram_lm.library import Library, Text, choosing
from engram_lm.library.choosing import Chooser, is_question, words_of
from engram_lm.library.encoding import TextEncoder

TEXTS = {
    "dog": "The office dog is called Orlando. He sleeps beside the reception desk.",
    "badge": "Anyone who loses a door badge pays 14 crowns for a new one.",
    "lens": "Broken microscopes go to Tobias Ankerholm. Lenses are cleaned with nettle cloth.",
    "rest": "The canteen is closed on Sundays. Nobody needs a badge there.",
    "empty": "",
}


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder.of(byte_tokenizer())


def snapshot_of(encoder, texts, dead=()):
    segment = Segment.build(
        [encoder.encode(text) for text in texts.values()],
        vocab_size=encoder.vocab_size,
        documents=[Document(id=name) for name in texts],
    )
    return Snapshot([LiveSegment(segment, dead_documents=dead)], vocab_size=encoder.vocab_size)


def chooser_of(encoder, texts):
    return Chooser(snapshot_of(encoder, texts), encoder)


def bm25_plain(passages, question, *, k1=1.5, b=0.75):
    """Lucene's variant, from its formula."""
    words = [words_of(text) for text in passages]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for held in words:
        score, n = 0.0, Counter(held)
        for word in dict.fromkeys(words_of(question)):
            df = sum(word in other for other in words)
            idf = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
            score += idf * n[word] / (n[word] + k1 * (1 - b + b * len(held) / mean))
        scores.append(score)
    return scores


def test_scores_are_those_of_the_formula_and_documents_count_as_their_best_passage(encoder):
    chooser = Chooser(snapshot_of(encoder, TEXTS), encoder)
    texts = [encoder.decode(encoder.encode(TEXTS[one.id])[one.begin : one.end]) for one in chooser.passages]
    assert "".join(texts) == "".join(TEXTS.values())
    for question in ("Who repairs a broken microscope?", "What do I pay for a lost badge?", "badge badges"):
        plain = bm25_plain(texts, question)
        best = {}
        for passage, score in zip(chooser.passages, plain, strict=True):
            best[passage.id] = max(best.get(passage.id, 0.0), score)
        wanted = sorted((name for name in best if best[name] > 0), key=lambda name: (-best[name], name))
        chosen = chooser.chosen(question, 5)
        assert [one.id for one in chosen] == wanted
        assert [one.score for one in chosen] == pytest.approx([best[name] for name in wanted], rel=1e-5)
        assert chooser.chosen(question, 1) == chosen[:1]


@given(st.text(alphabet="ab .é日?\n", max_size=60), st.integers(1, 40))
def test_passages_follow_one_another_through_any_text(text, least):
    encoder = _ENCODER
    chooser = Chooser(snapshot_of(encoder, {"x": text}), encoder, least_tokens=least)
    places = [(one.begin, one.end) for one in chooser.passages]
    n = len(encoder.encode(text))
    assert [begin for begin, _ in places] == [0, *(end for _, end in places)][: len(places)]
    assert (places[-1][1] if places else 0) == n
    assert all(least <= end - begin <= choosing.MOST_TOKENS or end == n for begin, end in places)


_ENCODER = TextEncoder.of(byte_tokenizer())


def test_coverage_is_the_share_of_the_questions_words(encoder):
    chooser = Chooser(snapshot_of(encoder, TEXTS), encoder)
    assert chooser.chosen("Orlando sleeping?", 1)[0].coverage < 1
    (one,) = chooser.chosen("Who is Tobias Ankerholm?", 5)
    assert (one.id, one.coverage) == ("lens", pytest.approx(1.0))
    half = chooser.chosen("Tobias unheard", 1)[0].coverage
    assert 0 < half < 0.5
    assert chooser.chosen("Which of them?", 3) == []
    assert chooser.chosen("quantum chromodynamics", 3) == []


def test_words_and_questions_in_several_scripts():
    assert words_of("The Badges were COSTING 1,140") == ["badg", "cost", "1", "140"]
    assert words_of("stored store stores storing") == ["stor"] * 4
    assert words_of("日本語 한국") == list("日本語한국")
    assert all(is_question(text) for text in ("Why?", 'Did he say "why?" ', "为什么？", "لماذا؟"))
    assert not any(is_question(text) for text in ("Because.", "", "a ? b"))


def test_sentences_in_focus_and_their_words(encoder):
    chooser = Chooser(snapshot_of(encoder, TEXTS), encoder)
    question = "Where does the dog Orlando sleep?"
    best, other = chooser.focus(question, ["dog", "rest"], most=3)
    assert encoder.decode(best.tokens) == "The office dog is called Orlando."
    assert encoder.decode(other.tokens) == " He sleeps beside the reception desk."
    assert best.weight == 1.0
    assert 0 < other.weight < 1

    def named(sentence):
        return "".join(
            encoder.decode([t]) if i else "_" for t, i in zip(sentence.tokens, sentence.inside, strict=True)
        )

    assert named(best) == "___ office_______ called_________"
    assert named(other) == "__________ beside____ reception desk_"
    assert best.starts == (3, 17)
    assert other.starts == (10, 21)  # "reception desk" is one phrase
    (code,) = chooser_of(encoder, {"x": "LX-4409 opens at 21:40, or 1,140 times."}).focus("When open?", ["x"])
    assert named(code) == "LX-4409_________ 21:40____ 1,140 times_"
    assert code.starts == (0, 16, 26)
    assert chooser.focus(question, ["badge"]) == ()
    assert len(chooser.focus(question, ["dog"])) == 1


def test_a_library_chooses_from_what_is_there_now(tmp_path, monkeypatch):
    with Library.create(tmp_path / "my notes", tokenizer=byte_tokenizer(), merging="by hand") as library:
        with pytest.raises(ConfigError, match="no documents to choose from"):
            library.chosen("Who?", 3)
        library.add(Text(id=name, text=text) for name, text in TEXTS.items())
        library.add([Text(id="theirs", text="Orlando is our secret.")], tenant="acme")
        assert [one.id for one in library.chosen("Who is Orlando?")] == ["dog"]
        assert [one.id for one in library.chosen("Who is Orlando?", tenant="acme")] == ["theirs"]
        assert library.chooser() is library.chooser()

        read = []
        plain = Chooser._read
        monkeypatch.setattr(
            Chooser, "_read", lambda self, tokens: (read.append(len(tokens)), plain(self, tokens))[1]
        )
        library.add([Text(id="cat", text="Orlando has a cat.")])
        assert [one.id for one in library.chosen("Who is Orlando?")] == ["cat", "dog"]
        assert read == [len("Orlando has a cat.")]
        library.delete(["dog"])
        assert [one.id for one in library.chosen("Who is Orlando?")] == ["cat"]
        (sentence,) = library.focus("Who is Orlando?", ["cat"])
        assert sentence.id == "cat"
        with pytest.raises(ConfigError, match="no document 'dog'"):
            library.focus("Who is Orlando?", ["dog"])
        with pytest.raises(ConfigError, match="1 or more; got 0"):
            library.chosen("Who is Orlando?", 0)


def test_without_bm25s_the_extra_is_named(encoder, monkeypatch):
    plain = builtins.__import__

    def without(name, *rest, **more):
        if name == "bm25s":
            raise ImportError(name)
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r'needs bm25s, the extra "retrieval".* install "bm25s'):
        Chooser(snapshot_of(encoder, TEXTS), encoder)


def test_deleted_documents_are_not_read(encoder):
    chooser = Chooser(snapshot_of(encoder, TEXTS, dead=[0]), encoder)
    assert "dog" not in {one.id for one in chooser.passages}
    assert chooser.chosen("Who is Orlando?", 3) == []
    assert np.isfinite(chooser._idf_W).all()
