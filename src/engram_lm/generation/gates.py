"""Which gate mixes an index into a model: a file's, a fixed lambda, or the one that is shipped for the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from engram_lm.errors import ConfigError
from engram_lm.mixing.gate import FixedLambda, Gate, Lambda, default_gate
from engram_lm.mixing.gate_provenance import told

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot


def named_gate(path: Path | None, lam: float | None) -> Lambda:
    """The gate that a command names, or the shipped one; whether it fits the model is `chosen_gate`'s to say."""
    if path is not None and lam is not None:
        raise ConfigError("--gate and --lam exclude each other: a gate says what lambda is.")
    if lam is not None:
        return FixedLambda(lam)
    return default_gate() if path is None else Gate.load(path)


def chosen_gate(path: Path | None, lam: float | None, *, model: Any, tokenizer: Any) -> Lambda:
    """`named_gate`, held against the model. IdentityError where a file's gate was fitted for another; ConfigError where none
    is shipped for this one."""
    from engram_lm.mixing.identity import require_identity

    gate = named_gate(path, lam)
    if lam is not None:
        return gate
    try:
        require_identity(gate, tokenizer=tokenizer, model=model)
    except ConfigError:
        raise
    except ValueError as error:
        if path is not None:
            raise
        raise ConfigError(
            f"No gate is shipped for this model ({error}) Give --lam 0.3, say, or fit one: engram-lm gate fit."
        ) from None
    return gate


def counting(gate: Lambda, count: str, snapshot: Snapshot) -> Lambda:
    """The gate with another way of counting P_memory: the same numbers where no source says a thing in two documents.

    ConfigError where no document has the field by which sources are to be told apart.
    """
    kind, colon, field = count.partition(":")
    if count != "documents" and (kind != "sources" or (colon and not field)):
        raise ConfigError(
            f"--count is documents, sources, or sources: and a field of the documents; got {count!r}."
        )
    if field and snapshot.views and not any(view.sources(count)[0] for view in snapshot.views):
        raise ConfigError(
            f"No document here has the field {field!r} of --count {count}: nothing would be capped."
        )
    return replace(gate, reading=replace(gate.reading, count=count))  # type: ignore[type-var]


class Audit:
    """Whether the documents that a gate was fitted on are still there: asked of a snapshot once, 8 µs a document."""

    def __init__(self, gate: Lambda) -> None:
        self.gate = gate
        self._known: WeakKeyDictionary[Snapshot, str] = WeakKeyDictionary()

    def note(self, snapshot: Snapshot) -> str:
        """A sentence where some are gone, else ""."""
        if snapshot not in self._known:
            self._known[snapshot] = told(self.gate, snapshot)
        return self._known[snapshot]
