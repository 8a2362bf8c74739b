"""Training data: a tokenised corpus, split by document and packed into blocks of one length.

The stream is the chosen documents in shuffled order, each with its end id; block i is the ids i·L … (i+1)·L − 1 of it.
What remains after the last whole block is counted in `left_over_tokens`. Nothing is copied: a block is cut from the
memory map when asked for.

    packing "concat"       input_ids, labels                  one stream; a block sees the document before
    packing "documents"    input_ids, labels, position_ids    positions restart at every document and every block;
                                                              a document's first id has label −100: nothing predicts it

Labels are the input ids: transformers' models shift them. Held-out documents are chosen by the hash of their text,
whatever the seed or the order of files, and equal texts are never on both sides.

    corpus = tokenise("corpus/*.jsonl.xz", tokenizer=tokenizer)
    blocks = pack(corpus, part="train", sequence_length=512, held_out_share=0.01, seed=0)
    torch.utils.data.DataLoader(blocks, batch_size=8)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from engram_lm.corpus.tokenised import Corpus
from engram_lm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

Packing = Literal["concat", "documents"]
Part = Literal["all", "train", "held_out"]

# What transformers' losses skip.
NO_LABEL = -100


def part_of(corpus: Corpus, *, part: Part, held_out_share: float) -> np.ndarray:
    """int64: the documents of one side of the split, in corpus order."""
    if part not in ("all", "train", "held_out"):
        raise ConfigError(f'part is "all", "train" or "held_out"; got {part!r}')
    if not 0.0 <= held_out_share < 1.0:
        raise ConfigError(f"held_out_share is {held_out_share}, wanted 0 ≤ share < 1")
    if part == "all":
        return np.arange(len(corpus))
    # 53 bits: a float holds them all.
    held_out = (corpus.text_hashes >> np.uint64(11)).astype(np.float64) / 2.0**53 < held_out_share
    return np.flatnonzero(held_out if part == "held_out" else ~held_out)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A map-style torch dataset: block number → dict of int64 tensors [sequence_length]. Picklable for loader workers.

    documents: int64, which documents of the corpus, in stream order. max_tokens: at most this many, rounded down to
    whole blocks; DataError where there are fewer.
    """

    corpus: Corpus
    documents: np.ndarray
    sequence_length: int
    packing: Packing = "concat"
    max_tokens: int | None = None
    left_over_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        length = self.sequence_length
        if self.packing not in ("concat", "documents"):
            raise ConfigError(f'packing is "concat" or "documents"; got {self.packing!r}')
        if length < 2:
            raise ConfigError(
                f"sequence_length is {length}, wanted at least 2: one id to read and one to predict"
            )
        ends = np.cumsum(self.corpus.lengths[self.documents])
        available = int(ends[-1]) if ends.size else 0
        count = available // length
        if self.max_tokens is not None:
            if self.max_tokens < length:
                raise ConfigError(f"max_tokens {self.max_tokens} is below one block of {length}")
            if self.max_tokens > available:
                raise DataError(
                    f"{self.max_tokens:,} tokens were asked for; these documents hold {available:,}"
                )
            count = self.max_tokens // length
        if not count:
            raise DataError(
                f"{available:,} tokens in {ends.size} documents do not fill one block of {length}"
            )
        object.__setattr__(self, "_ends", ends)
        object.__setattr__(self, "_count", count)
        object.__setattr__(self, "left_over_tokens", available - count * length)

    def __len__(self) -> int:
        return self._count  # type: ignore[attr-defined]

    @property
    def tokens(self) -> int:
        """Ids over all blocks."""
        return len(self) * self.sequence_length

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [length], starts int64): one block, and the places in it where documents begin."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"block {number} of {len(self)}")
        first = number % len(self) * self.sequence_length
        last = first + self.sequence_length
        ends = self._ends  # type: ignore[attr-defined]
        parts, starts = [], []
        at = int(np.searchsorted(ends, first, side="right"))
        while first < last:
            ids = self.corpus.document(int(self.documents[at]))
            begin = int(ends[at]) - len(ids)
            if begin >= first:
                starts.append(begin - last + self.sequence_length)
            stop = min(last, int(ends[at]))
            parts.append(ids[first - begin : stop - begin])
            first, at = stop, at + 1
        return np.concatenate(parts), np.array(starts, dtype=np.int64)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        import torch

        ids, starts = self.block(number)
        input_ids = torch.from_numpy(ids.astype(np.int64))
        if self.packing == "concat":
            return {"input_ids": input_ids, "labels": input_ids.clone()}
        labels = input_ids.clone()
        labels[torch.from_numpy(starts)] = NO_LABEL
        places = np.arange(self.sequence_length)
        begins = np.zeros(self.sequence_length, dtype=np.int64)
        begins[starts] = starts
        position_ids = torch.from_numpy(places - np.maximum.accumulate(begins))
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def pack(
    corpus: Corpus,
    *,
    sequence_length: int,
    packing: Packing = "concat",
    part: Part = "all",
    held_out_share: float = 0.0,
    seed: int | None = 0,
    max_tokens: int | None = None,
) -> Blocks:
    """One side of a corpus as blocks; documents shuffled by `seed`, or in corpus order where it is None."""
    documents = part_of(corpus, part=part, held_out_share=held_out_share)
    if seed is not None:
        documents = np.random.default_rng(seed).permutation(documents)
    return Blocks(corpus, documents, sequence_length, packing, max_tokens)
