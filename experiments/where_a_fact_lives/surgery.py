"""Operations on a trained memory: is a fact in its rows? Nothing but rows is touched, and every row is put back.

    whole          recall with the memory as it is, off, and with every n-gram reading another's rows
    necessity      one entry's rows become zero: is it lost, are the others not? As many random rows: is nothing lost?
    sufficiency    new 50 bits are written by optimising rows alone: are they said, and who else is harmed?
    transplant     the rows of another entry in their places, without any optimising: whose bits are said?
    specificity    entries that read none of the changed rows: logits bit for bit as before
    undo           sha256 of the table, and logits, before the first operation and after the last
    disk           the same directory with its rows left in the file: logits bit for bit

Three scopes: the rows at the name's last part, at all its parts, and at all its parts and answer tokens. (The rows at
<entry>, which every entry reads, are in none.) What is written goes into the rows at the name alone, or at the name and the
new answer: all that the new text reads. In a model without memory there is nothing to operate on: no parameter of
an expert belongs to an entry, and which ones to change would itself have to be found by optimising.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from asked import bits_of, interval, recall
from book import ANSWER, BITS, PLAIN, VALUES, Book, questions
from torch import nn

from engram_lm import from_pretrained, memories, memory_off
from engram_lm.attachment import OtherRows, reading

SCOPES = ("last part", "name", "name and answer")
WRITTEN = ("name", "name and answer")
CPU = torch.device("cpu")
WRITE_STEPS, WRITE_RATE, ENOUGH = 150, 0.03, 0.02  # at most; times 5 for rows; nats a token
TRANSPLANTS = 100
WATCHED = 1_000  # entries, at most, that are asked again after every operation


class Patient:
    """A model, its table, and which rows each entry reads where."""

    def __init__(self, model: nn.Module, book: Book, watched: np.ndarray | None = None) -> None:
        self.model, self.book, self.watched = model, book, watched
        self.memory = next(iter(memories(model).values()))
        self.slot = self.memory.slots[0]
        self.rows_NW = self.slot.table.rows_view()
        self.kept_NW = self.rows_NW.clone()
        self.address: dict[int, np.ndarray] = {}
        self.text: dict[int, np.ndarray] = {}
        for which, ids_BT in questions(book, np.arange(len(book)), form=PLAIN):
            canonical_BT = self.memory.canonical(torch.from_numpy(ids_BT[:, :-1]))
            for entry, text, address_TC in zip(
                which, ids_BT, self.slot.scheme.addresses(canonical_BT), strict=True
            ):
                self.address[int(entry)], self.text[int(entry)] = address_TC, text
        longest = max(address_TC.size for address_TC in self.address.values())
        self.reads = np.full((len(book), longest), -1)
        for entry, address_TC in self.address.items():
            self.reads[entry, : address_TC.size] = address_TC.ravel()

    def sharing(self, rows: np.ndarray) -> np.ndarray:
        """Which entries read one of the rows: bool [N]."""
        changed = np.zeros(len(self.rows_NW) + 1, dtype=bool)  # the last place is that of -1
        changed[rows] = True
        return changed[self.reads].any(1)

    def places(self, entry: int, scope: str) -> slice:
        """Positions of the question and answer that a scope speaks of."""
        parts = int(self.book.parts_N[entry])
        return {
            "last part": slice(parts, parts + 1),
            "name": slice(1, parts + 1),
            "name and answer": slice(1, None),
        }[scope]

    def rows_of(self, entry: int, scope: str) -> np.ndarray:
        return np.unique(self.address[entry][self.places(entry, scope)])

    def rows_read_for(self, entry: int, value_A: np.ndarray, scope: str) -> np.ndarray:
        """As `rows_of`, with another answer: its n-grams read other rows."""
        canonical_1T = self.memory.canonical(torch.from_numpy(self.with_value(entry, value_A))[None, :-1])
        return np.unique(self.slot.scheme.addresses(canonical_1T)[0][self.places(entry, scope)])

    def undo(self) -> None:
        self.rows_NW.copy_(self.kept_NW)

    def hash(self) -> str:
        return hashlib.sha256(self.rows_NW.numpy().tobytes()).hexdigest()

    @torch.no_grad()
    def logits(self, entries: np.ndarray) -> torch.Tensor:
        """Answer logits [N, 10, V] in the same batches whenever the same entries are asked."""
        found = []
        for _, ids_BT in questions(self.book, entries, form=PLAIN):
            found.append(self.model(input_ids=torch.from_numpy(ids_BT[:, :-1]), logits_to_keep=ANSWER).logits)
        return torch.cat(found)

    @torch.no_grad()
    def bits_as(self, entry: int, value_A: np.ndarray) -> tuple[float, bool]:
        """(bits, said in full) of an entry asked for some value."""
        ids_1T = torch.from_numpy(self.with_value(entry, value_A))[None]
        out = self.model(input_ids=ids_1T[:, :-1], logits_to_keep=ANSWER).logits
        bits, full = bits_of(out, ids_1T[:, -ANSWER:])
        return float(bits[0]), bool(full[0])

    def with_value(self, entry: int, value_A: np.ndarray) -> np.ndarray:
        return np.concatenate([self.text[entry][:-ANSWER], self.book.first_value + value_A])


def operate(book: Book, directory: Path, *, seed: int, line: Any, entries: int = 16) -> dict[str, Any]:
    """Everything above, on the saved model in `directory`. `entries`: how many are operated on."""
    model = from_pretrained(directory)
    draw = np.random.default_rng([seed, 4])
    watched = np.sort(draw.permutation(len(book))[:WATCHED])
    patient = Patient(model, book, watched)
    bits_N, full_N = recall(model, book, form=PLAIN, device=CPU)
    known = np.flatnonzero(full_N)
    said = len(known) >= entries
    if not said:
        known = np.argsort(-bits_N)[:entries]
    chosen = draw.permutation(known)[:entries]
    before, table = patient.logits(watched), patient.hash()
    told: dict[str, Any] = {
        "entries": len(book),
        "watched": len(watched),
        "operated_on": [int(entry) for entry in chosen],
        "chosen_among": "entries said in full" if said else "the entries with the most bits recalled",
        "rows": {"n": len(patient.rows_NW), "width": patient.rows_NW.shape[1], "columns": len(patient.slot.scheme.moduli)},
        "whole": _whole(model, book, bits_N, full_N, draw),
    }  # fmt: skip
    steps = len(chosen) * (len(SCOPES) + 1 + len(WRITTEN))
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        line(done, steps, None)

    told["necessity"] = {
        scope: _necessity(patient, chosen, scope, bits_N, full_N, draw, tick)
        for scope in (*SCOPES, "random rows")
    }
    told["sufficiency"] = {
        scope: _sufficiency(patient, chosen, scope, bits_N, full_N, draw, tick) for scope in WRITTEN
    }
    told["transplant"] = _transplant(patient, np.flatnonzero(full_N) if said else known, draw)
    line.end()
    after = patient.logits(watched)
    told["undo"] = {
        "table_sha256_before": table,
        "table_sha256_after": patient.hash(),
        "table_equal": table == patient.hash(),
        "logits_equal": bool(torch.equal(before, after)),
        "logits_compared": before.numel(),
    }
    told["disk"] = _from_disk(directory, book, patient)
    return told


def _whole(model: nn.Module, book: Book, bits_N: np.ndarray, full_N: np.ndarray, draw: Any) -> dict[str, Any]:
    """Recall of the book with the memory on, off, and exchanged."""
    with memory_off(model):
        off = recall(model, book, form=PLAIN, device=CPU)
    with reading(model, OtherRows(seed=int(draw.integers(1 << 30)))):
        other = recall(model, book, form=PLAIN, device=CPU)
    return {
        name: {
            "bits": round(float(b.mean()), 3),
            "bits_interval": interval(b),
            "full": round(float(f.mean()), 5),
        }
        for name, (b, f) in {"on": (bits_N, full_N), "off": off, "other rows": other}.items()
    }


def _necessity(
    patient: Patient,
    chosen: np.ndarray,
    scope: str,
    bits_N: np.ndarray,
    full_N: np.ndarray,
    draw: Any,
    tick: Any,
) -> dict[str, Any]:
    """Zero the rows of a scope, one entry at a time; "random rows": as many as the name's, wherever they are."""
    found = []
    for entry in chosen:
        if scope == "random rows":
            size = len(patient.rows_of(entry, "name"))
            rows = draw.choice(len(patient.rows_NW), size=size, replace=False)
        else:
            rows = patient.rows_of(entry, scope)
        patient.rows_NW[torch.from_numpy(rows)] = 0.0
        found.append(_harm(patient, int(entry), rows, bits_N, full_N))
        patient.undo()
        tick()
    return _summed(found)


def _harm(
    patient: Patient, entry: int, rows: np.ndarray, bits_N: np.ndarray, full_N: np.ndarray
) -> dict[str, Any]:
    """What a change to `rows` did: to the entry, to those that read one of them, and to those that read none."""
    asked = np.append(patient.watched[patient.watched != entry], entry)
    after_N, still_N = recall(patient.model, patient.book, form=PLAIN, device=CPU, entries=asked)
    bits_N, full_N = bits_N[asked], full_N[asked]
    everyone_N = patient.sharing(rows)
    sharing_N = everyone_N[asked]
    sharing_N[-1] = False
    apart_N = ~sharing_N
    apart_N[-1] = False
    told = {
        "rows": len(rows),
        "own_before": bits_N[-1],
        "own_after": after_N[-1],
        "own_full": bool(still_N[-1]),
        "sharing": int(sharing_N.sum()),
        "sharing_in_book": int(everyone_N.sum()) - int(everyone_N[entry]),
        "sharing_bits_lost": float((bits_N - after_N)[sharing_N].mean()) if sharing_N.any() else 0.0,
        "sharing_were_full": int((full_N & sharing_N).sum()),
        "sharing_no_longer_full": int((full_N & ~still_N & sharing_N).sum()),
        "apart": int(apart_N.sum()),
        "apart_bits_lost_most": float(np.abs(bits_N - after_N)[apart_N].max()) if apart_N.any() else 0.0,
    }
    # in batches of their own: another entry's change moves where experts cut their products, and so the last bit
    some = asked[apart_N][:64]
    if len(some):
        changed = patient.logits(some)
        held = patient.rows_NW.clone()
        patient.undo()
        told["apart_bit_equal"] = bool(torch.equal(changed, patient.logits(some)))
        told["apart_compared"] = len(some)
        patient.rows_NW.copy_(held)
    return told


def _summed(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the operated entries: means with 95 % bootstrap intervals, and sums."""
    own = np.array([one["own_after"] for one in found])
    were = sum(one["sharing_were_full"] for one in found)
    lost = sum(one["sharing_no_longer_full"] for one in found)
    compared = [one for one in found if "apart_bit_equal" in one]
    return {
        "operations": len(found),
        "rows_changed": _mean(found, "rows"),
        "own_bits_before": _mean(found, "own_before"),
        "own_bits_after": round(float(own.mean()), 3),
        "own_bits_after_interval": interval(own),
        "own_still_full": sum(one["own_full"] for one in found),
        "watched": found[0]["sharing"] + found[0]["apart"],
        "sharing_in_book": _mean(found, "sharing_in_book"),
        "sharing_entries": _mean(found, "sharing"),
        "sharing_bits_lost": _mean(found, "sharing_bits_lost"),
        "sharing_were_full": were,
        "sharing_no_longer_full": lost,
        "apart_entries": _mean(found, "apart"),
        "apart_compared_bit_for_bit": sum(one["apart_compared"] for one in compared),
        "apart_operations_bit_equal": sum(one["apart_bit_equal"] for one in compared),
        "apart_operations_compared": len(compared),
        "apart_bits_lost_most": max(one["apart_bits_lost_most"] for one in found),
    }


def _mean(found: list[dict[str, Any]], key: str) -> float:
    return round(float(np.mean([one[key] for one in found])), 3)


def _sufficiency(
    patient: Patient,
    chosen: np.ndarray,
    scope: str,
    bits_N: np.ndarray,
    full_N: np.ndarray,
    draw: Any,
    tick: Any,
) -> dict[str, Any]:
    """Write 50 new random bits into the rows of a scope, by the library's row rule on these rows alone."""
    found, written, old, steps = [], [], [], []
    for entry in chosen:
        value_A = draw.integers(VALUES, size=ANSWER)
        rows = patient.rows_read_for(int(entry), value_A, scope)
        steps.append(_write(patient, int(entry), value_A, rows))
        written.append(patient.bits_as(entry, value_A))
        old.append(patient.bits_as(entry, patient.book.value_NA[entry])[0])
        found.append(_harm(patient, int(entry), rows, bits_N, full_N))
        patient.undo()
        tick()
    told = _summed(found)
    for key in ("own_bits_after", "own_bits_after_interval", "own_still_full"):
        del told[key]
    bits = np.array([one for one, _ in written])
    return told | {
        "new_bits": round(float(bits.mean()), 3),
        "new_bits_interval": interval(bits),
        "new_said_in_full": sum(full for _, full in written),
        "old_bits": round(float(np.mean(old)), 3),
        "most_bits": BITS,
        "steps": round(float(np.mean(steps)), 1),
        "steps_at_most": WRITE_STEPS,
    }


def _write(patient: Patient, entry: int, value_A: np.ndarray, rows: np.ndarray) -> int:
    """Optimise `rows` until the entry says the value; all else stays. Returns the steps taken."""
    model, table = patient.model, patient.slot.table
    ids_1T = torch.from_numpy(patient.with_value(entry, value_A))[None]
    others = torch.ones(len(patient.rows_NW), dtype=torch.bool)
    others[torch.from_numpy(rows)] = False
    kept = patient.rows_NW[others].clone()
    optimizer = torch.optim.SGD([patient.slot.handle], lr=WRITE_RATE)
    updates = table.gradients.updates
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is patient.slot.handle)
    step = 0
    for step in range(1, WRITE_STEPS + 1):
        out = model(input_ids=ids_1T[:, :-1], logits_to_keep=ANSWER).logits
        loss = nn.functional.cross_entropy(out[0], ids_1T[0, -ANSWER:])
        if loss < ENOUGH:
            break
        for group in optimizer.param_groups:
            group["lr"] = WRITE_RATE * (1 - 0.9 * step / WRITE_STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        patient.rows_NW[others] = kept
    # the optimizer's state and count of updates belong to this writing
    table.restore({"rows": patient.rows_NW.clone()})
    table.gradients.set_updates(updates)
    return step


def _transplant(patient: Patient, known: np.ndarray, draw: Any) -> dict[str, Any]:
    """Rows of the donor's name in the places of the patient's, part by part; names of equally many parts."""
    own, donor, said_own, said_donor = [], [], 0, 0
    tried = 0
    for _ in range(10 * TRANSPLANTS):
        if tried == TRANSPLANTS or len(known) < 2:
            break
        entry, other = (int(i) for i in draw.choice(known, 2, replace=False))
        if patient.book.parts_N[entry] != patient.book.parts_N[other]:
            continue
        tried += 1
        here = patient.address[entry][patient.places(entry, "name")].ravel()
        there = patient.address[other][patient.places(other, "name")].ravel()
        patient.rows_NW[torch.from_numpy(here)] = patient.kept_NW[torch.from_numpy(there)]
        bits, full = patient.bits_as(entry, patient.book.value_NA[entry])
        own.append(bits)
        said_own += full
        bits, full = patient.bits_as(entry, patient.book.value_NA[other])
        donor.append(bits)
        said_donor += full
        patient.undo()
    return {
        "operations": tried,
        "own_bits": round(float(np.mean(own)), 3) if own else None,
        "own_said_in_full": said_own,
        "donor_bits": round(float(np.mean(donor)), 3) if donor else None,
        "donor_said_in_full": said_donor,
    }


def _from_disk(directory: Path, book: Book, patient: Patient) -> dict[str, Any]:
    """The same files, rows read from disk for every forward."""
    entries = np.arange(min(len(book), 5_000))
    wanted = patient.logits(entries)
    served = Patient.__new__(Patient)
    served.model, served.book = from_pretrained(directory, tier="disk"), book
    found = served.logits(entries)
    table = next(iter(memories(served.model).values())).tables[0]
    return {
        "table": type(table).__name__,
        "logits_compared": wanted.numel(),
        "logits_equal": bool(torch.equal(wanted, found)),
    }
