"""Which documents a question is about: BM25 (Robertson et al. 1994, with bm25s) over passages of the live documents.

Exact memory continues wording, and people ask in other words than documents are written in. What a question shares with a
document is its rare words; memory is then restricted to the documents that hold them (`Snapshot.restricted`).

    chosen = library.chosen("Who repairs microscopes?", k=3)      # [Chosen("repairs.md", 5.1, 0.8), ...]
    memory = library.store.snapshot().restricted(one.id for one in chosen)
    focus = library.focus("Who repairs microscopes?", [one.id for one in chosen])  # for mixing.pointing

A document counts as its best passage does: whole sentences, 24 tokens or more together. Words are lower case without the
endings -s, -es, -ed and -ing; Chinese, Japanese and Korean signs are words of their own. What is built from a generation's
texts stays in memory; the words of a document are read once for as long as the next generation holds it too.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.extras import missing

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot
    from engram_lm.library.encoding import TextEncoder

LEAST_TOKENS, MOST_TOKENS = 24, 128
_PASSAGES = 16  # that a focus takes its sentences from

# Lucene's list of English words that say nothing of a text, and the words that questions are made of
_STOP = """a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to
was will with am can could did do does from had has have he her him his how i me my our she should so some us we were
what when where which who whom whose why would you your must may any get got know many much need please tell want"""
STOP_WORDS = frozenset(_STOP.split())
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]|[^\W぀-ヿ㐀-鿿가-힯]+")


class Chosen(NamedTuple):
    """A document. score: BM25 of its best passage. coverage: how much of the question's words, each by its rarity, that
    passage holds, 0 to 1; a word that no document holds counts as the rarest."""

    id: str
    score: float
    coverage: float


@dataclass(frozen=True, eq=False)
class Sentence:
    """A sentence of a document that shares words with a question. tokens: int64 [n]. weight: 1 for the best, down to 0.

    inside: bool [n], whether a token belongs to words that the question does not hold and that are no stop words; such words
    side by side are a phrase. starts: the places where phrases begin.
    """

    id: str
    tokens: np.ndarray
    weight: float
    starts: tuple[int, ...]
    inside: np.ndarray


class Passage(NamedTuple):
    """Tokens begin .. end of a document."""

    id: str
    begin: int
    end: int


def words_of(text: str) -> list[str]:
    """The words of a text that say what it is about, as they are compared."""
    return [_stem(word) for word in _WORD.findall(text.lower()) if word not in STOP_WORDS]


def is_question(text: str) -> bool:
    """Whether a prompt ends with a question mark of any script."""
    return text.rstrip().rstrip("\"'”’»)").endswith(("?", "？", "؟", ";", "՞"))


class Chooser:
    """BM25 over the documents of one snapshot. words: what earlier choosers read, by a document's sha256; added to."""

    def __init__(
        self,
        snapshot: "Snapshot",
        encoder: "TextEncoder",
        *,
        words: dict[str, "_Words"] | None = None,
        least_tokens: int = LEAST_TOKENS,
    ) -> None:
        self._bm25s, self.encoder, self.least_tokens = _library(), encoder, least_tokens
        self.words: dict[str, _Words] = {}
        self.passages: list[Passage] = []
        self._ends: dict[int, bool] = {}
        self._tokens: dict[str, np.ndarray] = {}
        of_passage: list[tuple[str, ...]] = []
        for document_id, sha256, tokens in _live(snapshot):
            key = sha256 or document_id
            found = (words or {}).get(key) or self._read(tokens)
            self.words[key], self._tokens[document_id] = found, tokens
            for (begin, end), held in zip(found.places, found.words, strict=True):
                self.passages.append(Passage(document_id, begin, end))
                of_passage.append(held)
        self.vocabulary: dict[str, int] = {}
        held_P = [
            [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in held] for held in of_passage
        ]
        self._sets = [frozenset(held) for held in held_P]
        n_W = np.zeros(len(self.vocabulary), np.int64)
        for held in self._sets:
            n_W[list(held)] += 1
        P = len(self.passages)
        self._idf_W = np.log1p((P - n_W + 0.5) / (n_W + 0.5))
        self._most_idf = float(np.log1p((P + 0.5) / 0.5))
        self._index: Any = None
        if self.vocabulary:
            self._index = self._bm25s.BM25(method="lucene")
            self._index.index((held_P, dict(self.vocabulary)), show_progress=False)

    def chosen(self, question: str, k: int) -> list[Chosen]:
        """At most k documents that share a word with the question, best first; of equal ones the smaller id."""
        if k < 1:
            raise ConfigError(f"The number of documents is 1 or more; got {k}.")
        if not self._tokens:
            raise ConfigError("There are no documents to choose from; add some: engram-lm index add.")
        best: dict[str, Chosen] = {}
        for at, score, coverage in self.ranked(question):
            best.setdefault(self.passages[at].id, Chosen(self.passages[at].id, score, coverage))
            if len(best) == k:
                break
        return list(best.values())

    def ranked(self, question: str) -> Iterator[tuple[int, float, float]]:
        """(place in `passages`, score, coverage) of all passages that share a word with the question, best first."""
        words = list(dict.fromkeys(words_of(question)))
        ids = [self.vocabulary[word] for word in words if word in self.vocabulary]
        if not ids:
            return
        score_P = np.asarray(self._index.get_scores_from_ids(ids))
        whole = self._idf_W[ids].sum() + self._most_idf * (len(words) - len(ids))
        at_P = np.flatnonzero(score_P > 0)
        order = sorted(
            at_P.tolist(), key=lambda at: (-score_P[at], self.passages[at].id, self.passages[at].begin)
        )
        for at in order:
            shared = sum(self._idf_W[i] for i in ids if i in self._sets[at])
            yield at, float(score_P[at]), float(shared / whole)

    def focus(self, question: str, ids: Iterable[str], *, most: int = 1) -> tuple[Sentence, ...]:
        """The sentences of these documents that share most with the question, best first."""
        wanted, found = set(ids), []
        missing = sorted(wanted - self._tokens.keys())
        if missing:
            raise ConfigError(f"There is no document {missing[0]!r} here.")
        asked = set(words_of(question))
        for at, score, _ in self.ranked(question):
            if self.passages[at].id not in wanted:
                continue
            passage = self.passages[at]
            tokens = self._tokens[passage.id][passage.begin : passage.end].astype(np.int64)
            for begin, end in self._cut(tokens.tolist(), least=1):
                words = set(words_of(self.encoder.decode(tokens[begin:end])))
                shared = sum(
                    float(self._idf_W[self.vocabulary[word]])
                    for word in words & asked
                    if word in self.vocabulary
                )
                if shared:
                    found.append((shared, score, passage, tokens[begin:end]))
            if len(found) >= _PASSAGES:
                break
        found.sort(key=lambda one: (-one[0], -one[1], one[2]))
        return tuple(
            self._sentence(passage.id, tokens, (shared / found[0][0]) ** 2, asked)
            for shared, _, passage, tokens in found[:most]
        )

    def _sentence(self, document_id: str, tokens: np.ndarray, weight: float, asked: set[str]) -> Sentence:
        pieces = [self.encoder.decode([token]) for token in tokens]
        text, bounds = "".join(pieces), np.cumsum([0] + [len(piece) for piece in pieces])
        starts, inside, behind = [], np.zeros(len(tokens), bool), -1
        for word in _WORD.finditer(text):
            if word[0].lower() in STOP_WORDS or _stem(word[0].lower()) in asked:
                continue
            first, last = (
                np.searchsorted(bounds, word.start(), "right") - 1,
                np.searchsorted(bounds, word.end(), "left"),
            )
            # some tokenizers cut the blank before a number
            if first > 0 and pieces[first - 1] == " ":
                first -= 1
            # "Corvina Trust", "LX-4409", "21:40" are named from their beginning alone
            between = text[behind : word.start()] if behind >= 0 else "."
            inside[first:last] = True
            if between.strip() and (behind < 0 or len(between) > 1):
                starts.append(int(first))
            elif starts:
                inside[starts[-1] : last] = True
            behind = word.end()
        return Sentence(document_id, tokens, weight, tuple(starts), inside)

    def _read(self, tokens: np.ndarray) -> "_Words":
        places = list(self._cut(tokens.tolist()))
        texts = [self.encoder.decode(tokens[begin:end]) for begin, end in places]
        return _Words(tuple(places), tuple(tuple(words_of(text)) for text in texts))

    def _cut(self, tokens: list[int], *, least: int | None = None) -> Iterator[tuple[int, int]]:
        begin, least = 0, self.least_tokens if least is None else least
        for at, token in enumerate(tokens, 1):
            n = at - begin
            if (n >= least and self._is_end(token)) or n == MOST_TOKENS:
                yield begin, at
                begin = at
        if begin < len(tokens):
            yield begin, len(tokens)

    def _is_end(self, token: int) -> bool:
        if token not in self._ends:
            text = self.encoder.decode([token])
            self._ends[token] = "\n" in text or text.endswith((".", "!", "?", "。", "！", "？"))
        return self._ends[token]


class _Words(NamedTuple):
    """The passages of a document, as places in its tokens, and their words."""

    places: tuple[tuple[int, int], ...]
    words: tuple[tuple[str, ...], ...]


def _live(snapshot: "Snapshot") -> Iterable[tuple[str, str, np.ndarray]]:
    for view in snapshot.views:
        segment = view.segment
        for number in range(segment.n_documents):
            if number not in view.dead_documents:
                document = segment.document(number)
                yield document.id, document.sha256, segment.document_tokens(number)


def _stem(word: str) -> str:
    for ending, least in (("ing", 6), ("ed", 5), ("es", 5), ("s", 4)):
        if word.endswith(ending) and len(word) >= least and not word.endswith("ss"):
            word = word[: -len(ending)]
            break
    # "store" and "stored", "bake" and "baking"
    return word[:-1] if word.endswith("e") and len(word) >= 4 else word


def _library() -> Any:
    try:
        import bm25s
    except ImportError:
        raise missing("Choosing documents for a question needs bm25s", "retrieval") from None
    return bm25s
