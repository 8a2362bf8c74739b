"""Fitting a gate in seconds and bounding what it may cost elsewhere. NumPy; no torch.

    examples = Examples.join([examples_of(...), ...])       # positions with P_model, P_memory and features
    gate = fit_gate(examples, kind="logistic", tokenizer=..., model=...)
    gate = calibrate(gate, held_out, bound=0.005)           # general text becomes at most 0.5 % more perplexing
    report(gate, held_out)                                  # perplexities by group, and is lambda what it says?

The objective is the likelihood itself, sum of log((1 - lambda) P_model + lambda P_memory): no labels are made up. Every
group (a domain at one index size, one kind of general text) weighs the same; general groups together weigh
`general_weight` times what the others do together.

Who makes examples keeps three rules. A document is looked up in `snapshot.without(its id)`: fitted on documents that the
index holds, a gate believes every long match and fails on new text (perplexity 149 -> 420 in a first trial). General text is
looked up in an index it has nothing to do with. And indexes of 1, 10, 100 and all documents take part, so that the gate
works from the first document on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from engram_lm.errors import ConfigError, DataError
from engram_lm.extras import missing
from engram_lm.mixing.features import NAMES, features
from engram_lm.mixing.gate import MOST, Gate, LookupConfig
from engram_lm.mixing.lookups import Lookups, evidence

_HIDDEN = 16
_MOST_RATIO = 1e12


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Positions to fit on. features: float64 [N, F]; log_p_model, p_memory: of the token that came, float64 [N].

    group: int64 [N] into `groups`; general: bool, one a group. Positions where nothing was found are left out of features
    by `found` = False: lambda is 0 there.
    """

    features: np.ndarray
    log_p_model: np.ndarray
    p_memory: np.ndarray
    found: np.ndarray
    group: np.ndarray
    groups: tuple[str, ...]
    general: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.group)

    def of(self, groups: Sequence[str]) -> Examples:
        """Positions of these groups alone."""
        kept = np.isin(self.group, [self.groups.index(name) for name in groups])
        arrays = ("features", "log_p_model", "p_memory", "found")
        old = np.array([self.groups.index(name) for name in groups])
        place = np.zeros(len(self.groups), np.int64)
        place[old] = np.arange(len(old))
        return Examples(
            **{name: getattr(self, name)[kept] for name in arrays},
            group=place[self.group[kept]],
            groups=tuple(groups),
            general=tuple(self.general[i] for i in old),
        )

    @classmethod
    def join(cls, parts: list[Examples]) -> Examples:
        """All positions; groups of one name become one."""
        if not parts:
            raise DataError("There are no examples to fit a gate on.")
        names = {
            name: general for part in parts for name, general in zip(part.groups, part.general, strict=True)
        }
        place = {name: i for i, name in enumerate(names)}
        group = [np.array([place[name] for name in part.groups])[part.group] for part in parts]
        arrays = ("features", "log_p_model", "p_memory", "found")
        return cls(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays},
            group=np.concatenate(group),
            groups=tuple(names),
            general=tuple(names.values()),
        )


def examples_of(
    memory: Lookups,
    survey_N6: np.ndarray,
    *,
    tokens: int,
    group: str,
    kind: Literal["domain", "general"],
    generated: np.ndarray | int = 0,
) -> Examples:
    """Examples of one text. memory: of its tokens 1 .. N (`reading.read_text` without row 0); survey: the rows of
    `onepass.survey_rows` before them, with `memory.top` as the other token. tokens: of the index."""
    if memory.p is None:
        raise ConfigError("Examples need P_memory of the token that came: memory of `read_text`.")
    return Examples(
        features=features(evidence(memory, survey_N6, generated=generated), tokens=tokens),
        log_p_model=survey_N6[:, 0].copy(),
        p_memory=np.asarray(memory.p, np.float64),
        found=np.asarray(memory.count) > 0,
        group=np.zeros(len(survey_N6), np.int64),
        groups=(group,),
        general=(kind == "general",),
    )


def fit_gate(
    examples: Examples,
    *,
    kind: Literal["logistic", "mlp"] = "logistic",
    general_weight: float = 1.0,
    decay: float = 1e-3,
    steps: int = 200,
    seed: int = 0,
    tokenizer: str = "",
    model: str = "",
    model_name: str = "",
    reading: LookupConfig | None = None,
    trained_on: dict[str, Any] | None = None,
) -> Gate:
    """The gate of greatest likelihood over all examples at once. decay: of the squared weights. steps: at most."""
    if kind not in ("logistic", "mlp"):
        raise ConfigError(f"A gate is logistic or mlp; got {kind!r}.")
    use = examples.found
    if not use.any():
        raise DataError(
            "Nothing was found at any position: an index of these documents' neighbours is needed."
        )
    x_NF = examples.features[use]
    # the range the gate may rely on leaves out one position in a thousand at each end
    low, high = np.quantile(x_NF, [0.001, 0.999], axis=0)
    x_NF = np.clip(x_NF, low, high)
    mean, scale = x_NF.mean(0), np.maximum(x_NF.std(0), 1e-3)
    x_NF = (x_NF - mean) / scale
    weight_N = _weights(examples, general_weight)[use]
    ratio_N = _ratios(examples)[use]
    rng = np.random.default_rng(seed)
    F = len(NAMES)
    if kind == "logistic":
        weights = {"w": np.zeros(F), "b": np.array(-2.0)}
    else:
        weights = {
            "W": rng.normal(size=(_HIDDEN, F)) / np.sqrt(F), "a": np.zeros(_HIDDEN),
            "v": rng.normal(size=_HIDDEN) / np.sqrt(_HIDDEN), "b": np.array(-2.0),
        }  # fmt: skip
    weights = _descend(lambda at: _objective(kind, at, x_NF, ratio_N, weight_N, decay), weights, steps=steps)
    return Gate(
        kind=kind, mean=mean, scale=scale, low=low, high=high, weights=weights, tokenizer=tokenizer, model=model,
        model_name=model_name, reading=reading or LookupConfig(), trained_on=trained_on or {},
    )  # fmt: skip


def calibrate(gate: Gate, held_out: Examples, *, bound: float = 0.005, margin: float = 1.0) -> Gate:
    """The same gate with the smallest shift >= 0 at which no general group's perplexity rises by more than `bound`.

    margin: the part of the bound that is used, below 1 to leave room for text of other kinds.
    held_out: other positions than the gate was fitted on; DataError without general groups.
    """
    if not any(held_out.general):
        raise DataError("A bound on harm to general text needs general text among the held-out examples.")

    def worst(shift: float) -> float:
        rows = report(replace(gate, shift=shift), held_out)["groups"]
        return max(row["perplexity_mixed"] / row["perplexity_alone"] - 1 for row in rows if row["general"])

    low, high = 0.0, 0.0
    if worst(0.0) > bound * margin:
        high = 1.0
        while worst(high) > bound * margin and high < 64:
            low, high = high, high * 2
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if worst(middle) > bound * margin else (low, middle)
    shifted = replace(gate, shift=float(high))
    measured = {
        **report(shifted, held_out),
        "bound": bound,
        "margin": margin,
        "worst_general": worst(shifted.shift),
    }
    return replace(shifted, measured=measured)


def lambdas(gate: Gate, examples: Examples) -> np.ndarray:
    """lambda at every position, 0 where nothing was found."""
    return np.where(examples.found, gate.lambdas(examples.features), 0.0)


def report(gate: Gate, examples: Examples, *, bins: int = 10) -> dict[str, Any]:
    """Perplexity of every group alone and mixed, and calibration: of positions with about this lambda, the lambda that
    would have been best."""
    lam, ratio = lambdas(gate, examples), _ratios(examples)
    gain = np.log1p(lam * (ratio - 1))
    groups = []
    for g, (name, general) in enumerate(zip(examples.groups, examples.general, strict=True)):
        here = examples.group == g
        alone = -examples.log_p_model[here].mean()
        groups.append({
            "group": name, "general": general, "tokens": int(here.sum()),
            "perplexity_alone": float(np.exp(alone)), "perplexity_mixed": float(np.exp(alone - gain[here].mean())),
            "mean_lambda": float(lam[here].mean()),
        })  # fmt: skip
    edges = np.concatenate([[0, 0.002, 0.005, 0.01, 0.02], np.linspace(0, 1, bins + 1)[1:] * 0.95 + 0.05])
    rows = []
    for low, high in itertools.pairwise(edges):
        here = examples.found & (lam >= low) & (lam < high)
        if here.sum() >= 50:
            rows.append({
                "from": float(low), "to": float(high), "positions": int(here.sum()), "mean": float(lam[here].mean()),
                "best": _best(ratio[here]), "memory_right": float((ratio[here] > 1).mean()),
            })  # fmt: skip
    return {"groups": groups, "calibration": rows}


def draw_calibration(rows: list[dict[str, Any]], path: Any, *, title: str) -> None:
    """calibration.png: the lambda that would have been best against the gate's, both on the logit scale."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing("Plots need matplotlib", "hf") from None
    figure = Figure(figsize=(5.4, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ends = (5e-4, 0.9995)
    axes.plot(ends, ends, color="#c9d3dd", linewidth=1.2, label="as good as its word")
    said, best = (np.clip([row[name] for row in rows], *ends) for name in ("mean", "best"))
    size = 12 + 160 * np.array([row["positions"] for row in rows]) / max(row["positions"] for row in rows)
    axes.scatter(
        said, best, s=size, color="#c0392b", alpha=0.8, linewidths=0, label="positions (area: how many)"
    )
    axes.set_xscale("logit"), axes.set_yscale("logit")
    axes.set_xlim(ends), axes.set_ylim(ends)
    ticks = [0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.set_xlabel("λ of the gate", color="#222222")
    axes.set_ylabel("λ that would have been best", color="#222222")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.tick_params(colors="#222222", length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color="#222222")
    figure.savefig(path, format="png")


def _ratios(examples: Examples) -> np.ndarray:
    with np.errstate(over="ignore"):
        ratio = examples.p_memory * np.exp(np.minimum(-examples.log_p_model, 700.0))
    return np.where(examples.found, np.minimum(ratio, _MOST_RATIO), 1.0)


def _weights(examples: Examples, general_weight: float) -> np.ndarray:
    size_G = np.bincount(examples.group, minlength=len(examples.groups))
    general_G = np.array(examples.general)
    share_G = np.where(general_G, general_weight / max(general_G.sum(), 1), 1 / max((~general_G).sum(), 1))
    return (share_G / np.maximum(size_G, 1) / share_G.sum())[examples.group]


Weights = dict[str, np.ndarray]


def _objective(
    kind: str, weights: Weights, x_NF: np.ndarray, ratio_N: np.ndarray, weight_N: np.ndarray, decay: float
) -> tuple[float, Weights]:
    """-sum weight log(1 + lambda (ratio - 1)) + decay |weights|^2 / 2, biases free; and its gradient."""
    if kind == "logistic":
        z_N = x_NF @ weights["w"] + weights["b"]
    else:
        hidden_NH = np.tanh(x_NF @ weights["W"].T + weights["a"])
        z_N = hidden_NH @ weights["v"] + weights["b"]
    sigmoid_N = 1 / (1 + np.exp(np.clip(-z_N, -700, 700)))
    lam_N = MOST * sigmoid_N
    gain_N = lam_N * (ratio_N - 1)
    squares = sum(float((array**2).sum()) for name, array in weights.items() if name in "wWv")
    value = -float(weight_N @ np.log1p(gain_N)) + decay * squares / 2
    slope_N = -weight_N * gain_N / (1 + gain_N) * (1 - sigmoid_N)
    if kind == "logistic":
        return value, {"w": x_NF.T @ slope_N + decay * weights["w"], "b": slope_N.sum()}
    back_NH = slope_N[:, None] * weights["v"] * (1 - hidden_NH**2)
    return value, {
        "W": back_NH.T @ x_NF + decay * weights["W"],
        "a": back_NH.sum(0),
        "v": hidden_NH.T @ slope_N + decay * weights["v"],
        "b": slope_N.sum(),
    }


def _descend(
    objective: Callable[[Weights], tuple[float, Weights]], start: Weights, *, steps: int, memory: int = 12
) -> Weights:
    """Limited-memory BFGS (Nocedal 1980) with halved steps; ends where a step gains less than 1e-9."""
    shapes = {name: np.shape(array) for name, array in start.items()}

    def flat(weights: Weights) -> np.ndarray:
        return np.concatenate([np.ravel(weights[name]) for name in shapes])

    def named(vector: np.ndarray) -> Weights:
        parts = np.split(vector, np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    at = flat(start)
    value, gradient = objective(named(at))
    gradient = flat(gradient)
    past: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(steps):
        direction, kept = -gradient, []
        for s, y in reversed(past):
            a = (s @ direction) / (y @ s)
            direction = direction - a * y
            kept.append(a)
        if past:
            s, y = past[-1]
            direction = direction * ((s @ y) / (y @ y))
        else:
            direction = direction / max(1.0, float(np.abs(gradient).max()))
        for (s, y), a in zip(past, reversed(kept), strict=True):
            direction = direction + s * (a - (y @ direction) / (y @ s))
        slope, size = float(gradient @ direction), 1.0
        while True:
            there = at + size * direction
            new_value, found = objective(named(there))
            if new_value <= value + 1e-4 * size * slope or size < 1e-8:
                break
            size /= 2
        if not new_value < value - 1e-9:
            break
        new_gradient = flat(found)
        s, y = there - at, new_gradient - gradient
        if s @ y > 1e-12:
            past = [*past[-memory + 1 :], (s, y)]
        at, value, gradient = there, new_value, new_gradient
    return named(at)


def _best(ratio_N: np.ndarray) -> float:
    """argmax over lambda of sum log(1 + lambda (ratio - 1)): concave, by halving its slope."""
    low, high = 0.0, MOST
    for _ in range(40):
        middle = (low + high) / 2
        slope = ((ratio_N - 1) / (1 + middle * (ratio_N - 1))).sum()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return (low + high) / 2
