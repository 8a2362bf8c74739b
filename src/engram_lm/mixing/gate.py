"""lambda: how far memory is believed at a position, from features (`features`), by a few learned numbers.

    gate = Gate.load("gate.json")                        # or default_gate("smollm2"), or FixedLambda(0.25)
    gate.require(tokenizer=fingerprint, model=sha256)    # IdentityError where it was fitted for others
    lam_N = gate.lambdas(features(evidence, tokens=snapshot.n_tokens))

z = w . x + b (logistic) or v . tanh(W x + a) + b (mlp), over standardised features, each held to the range it had when
the gate was fitted; lambda = most * sigmoid(z - shift). `shift` is what `fit.calibrate` needed for the bound on harm to
general text that the file states. Nothing found (no live document) is lambda = 0.

A gate file is JSON and names what it was fitted for: tokenizer, model, feature version, how memory is read (`LookupConfig`),
data, and the harm measured. `tests/mixing/test_mixing_gate.py` keeps a golden one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from engram_lm.durable import write_atomic
from engram_lm.errors import CheckpointError, ConfigError, IdentityError
from engram_lm.mixing.features import NAMES, VERSION
from engram_lm.mixing.mix import Space

FORMAT = "engram-lm gate 2"
# It names its tokenizer by the first print (identity/writings.py).
FIRST_FORMAT = "engram-lm gate 1"
MOST = 0.999


@dataclass(frozen=True, kw_only=True)
class LookupConfig:
    """How memory is read; see `Snapshot.distribution`. A gate knows P_memory only as it was read when it was fitted."""

    discount: float = 0.75
    orders: Literal["all", "longest"] = "all"
    count: Literal["tokens", "documents", "sources"] = "tokens"
    cap: int | None = None
    max_order: int = 64


class Lambda(Protocol):
    """What mixing asks of a gate. `space` is what lambda is meant for; `reading`, how P_memory is to be read."""

    space: Space
    reading: LookupConfig

    def lambdas(self, features_NF: np.ndarray) -> np.ndarray:
        """float64 [N], each in [0, 1)."""
        ...

    def require(self, *, tokenizer: str | None, model: str | None) -> None:
        """IdentityError where the gate was made for another tokenizer or model."""
        ...


@dataclass(frozen=True)
class FixedLambda:
    """One lambda everywhere. Works with every model, and harms general text: it is the baseline, not the default."""

    value: float
    space: Space = "linear"
    reading: LookupConfig = field(default_factory=LookupConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.value < 1:
            raise ConfigError(f"A fixed lambda is at least 0 and less than 1; got {self.value}.")
        if self.space not in ("linear", "log"):
            raise ConfigError(f"space is linear or log; got {self.space!r}.")

    def lambdas(self, features_NF: np.ndarray) -> np.ndarray:
        return np.full(len(features_NF), float(self.value))

    def require(self, *, tokenizer: str | None, model: str | None) -> None:
        """Nothing: a fixed lambda was not fitted."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A fitted gate. All arrays float64: mean, scale, low, high [F] of the features; weights by name (`kind`).

    logistic: w [F], b []. mlp: W [H, F], a [H], v [H], b [].
    tokenizer, model: fingerprints ("" fits any, for tests); model_name: for people; trained_on, measured: for people.
    """

    kind: Literal["logistic", "mlp"]
    mean: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    weights: dict[str, np.ndarray]
    shift: float = 0.0
    tokenizer: str = ""
    model: str = ""
    model_name: str = ""
    reading: LookupConfig = field(default_factory=LookupConfig)
    trained_on: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    space = "linear"

    def __post_init__(self) -> None:
        F = len(NAMES)
        shapes = {"logistic": {"w": (F,), "b": ()}}.get(self.kind)
        if self.kind == "mlp":
            H = np.asarray(self.weights.get("v", ())).size
            shapes = {"W": (H, F), "a": (H,), "v": (H,), "b": ()}
        if shapes is None:
            raise ConfigError(f"A gate is logistic or mlp; got {self.kind!r}.")
        if set(self.weights) != set(shapes):
            raise ConfigError(f"A {self.kind} gate has weights {sorted(shapes)}; got {sorted(self.weights)}.")
        for name, shape in {**shapes, **dict.fromkeys(("mean", "scale", "low", "high"), (F,))}.items():
            inside = name in shapes
            array = np.asarray(self.weights[name] if inside else getattr(self, name), np.float64)
            if array.shape != shape or not np.isfinite(array).all():
                raise ConfigError(f"{name} of a gate has finite numbers of shape {shape}; got {array.shape}.")
            if inside:
                self.weights[name] = array
            else:
                object.__setattr__(self, name, array)

    def scores(self, features_NF: np.ndarray) -> np.ndarray:
        """z before the shift, float64 [N]."""
        x_NF = (np.clip(features_NF, self.low, self.high) - self.mean) / self.scale
        w = self.weights
        if self.kind == "logistic":
            return x_NF @ w["w"] + w["b"]
        return np.tanh(x_NF @ w["W"].T + w["a"]) @ w["v"] + w["b"]

    def lambdas(self, features_NF: np.ndarray) -> np.ndarray:
        """float64 [N], each in (0, MOST)."""
        return MOST / (1 + np.exp(np.minimum(self.shift - self.scores(features_NF), 700.0)))

    def require(self, *, tokenizer: str | None, model: str | None) -> None:
        """IdentityError where the gate was fitted for another tokenizer or model; None leaves one unchecked."""
        if tokenizer is not None and self.tokenizer and tokenizer != self.tokenizer:
            raise IdentityError(
                f"This gate was fitted for the tokenizer {self.tokenizer[:12]}, not for {tokenizer[:12]}. "
                "Fit one with `engram-lm gate fit`, or use a fixed lambda."
            )
        if model is not None and self.model and model != self.model:
            raise IdentityError(
                f"This gate was fitted for {self.model_name or 'a model'} with weights {self.model[:12]}, not for "
                f"{model[:12]}. Fit one with `engram-lm gate fit`, or use a fixed lambda."
            )

    # ---- files --------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The file's text; numbers with nine digits."""

        def plain(array: np.ndarray) -> Any:
            return json.loads(
                json.dumps(np.asarray(array).tolist()), parse_float=lambda x: float(f"{float(x):.9g}")
            )

        facts = {
            "format": FORMAT,
            "features": {"version": VERSION, "names": list(NAMES)},
            "kind": self.kind,
            "model": {"name": self.model_name, "sha256": self.model},
            "tokenizer": self.tokenizer,
            "reading": asdict(self.reading),
            "shift": self.shift,
            **{name: plain(getattr(self, name)) for name in ("mean", "scale", "low", "high")},
            "weights": {name: plain(array) for name, array in self.weights.items()},
            "trained_on": self.trained_on,
            "measured": self.measured,
        }
        return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"

    def save(self, path: str | os.PathLike) -> Path:
        """Write the gate's file."""
        path = Path(path)
        write_atomic(path, self.to_json())
        return path

    @classmethod
    def from_json(cls, text: str, *, where: str = "this gate") -> Gate:
        """Read `to_json`'s text; CheckpointError for anything else."""
        try:
            facts = json.loads(text)
            if facts.pop("format") not in (FIRST_FORMAT, FORMAT):
                raise ValueError("it is of another format")
            known = facts.pop("features")
            if known != {"version": VERSION, "names": list(NAMES)}:
                raise CheckpointError(
                    f"{where} reads features of version {known.get('version')}; this build has {VERSION}. Fit it again."
                )
            model = facts.pop("model")
            weights = {name: np.asarray(array, np.float64) for name, array in facts.pop("weights").items()}
            reading = LookupConfig(**facts.pop("reading"))
            return cls(
                **facts, reading=reading, weights=weights, model=model["sha256"], model_name=model["name"]
            )
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where} is no gate of this build: {error}. Fit it again.") from None

    @classmethod
    def load(cls, path: str | os.PathLike) -> Gate:
        """Read a gate's file."""
        try:
            text = Path(path).read_text(encoding="utf8")
        except OSError as error:
            raise CheckpointError(f"{path}: no gate can be read here ({error.strerror}).") from None
        return cls.from_json(text, where=str(path))


_SHIPPED = {"smollm2": "gate-smollm2.json"}


def default_gate(name: str = "smollm2") -> Gate:
    """The gate that is shipped for a base (experiments/instant_adaptation/fit_gate.py made it)."""
    if name not in _SHIPPED:
        raise ConfigError(
            f"No gate is shipped for {name!r}, only for {', '.join(_SHIPPED)}. Fit one with `engram-lm gate fit`, "
            "or use a fixed lambda."
        )
    text = resources.files("engram_lm.mixing").joinpath(_SHIPPED[name]).read_text(encoding="utf8")
    return Gate.from_json(text, where=_SHIPPED[name])
