"""What each arm trains: one TrainConfig an arm, equal in everything but the one thing the arm is about.

    arm              what it is                                                                 of which bases
    memory           the memory                                                                 all
    one-row … unigram   its controls, see `arms`                                                all
    none             no memory: a pretrained base as it is; a scratch base trained alone        all
    wide-ffn         no memory, feed-forward layers with as many more parameters (rows counted) scratch
    fast-embedding   no memory, the token embedding at 5 times the rate without decay           scratch
    continued        no memory, all weights trained on (from `train_from`), a tenth of the rate pretrained
    bias             one learned vector in each place where memory would enter                  pretrained
    lora             no memory, an adapter as large as the memory's weights without its rows    pretrained

Data, order, steps, seed and schedule are the same. Pretrained bases are frozen but where the table says otherwise.

    plan = Plan(shared=TrainConfig(base="smollm2", data=("corpus.jsonl",)), arms=("memory", "one-row"), seeds=(0,))
    plan.config("one-row", 0, sizes)         # a TrainConfig for engram_lm.training
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engram_lm.ablation.arms import MEMORY_ARMS, control
from engram_lm.ablation.sizes import Sizes
from engram_lm.errors import ConfigError
from engram_lm.training.config import PER_CALL, TrainConfig

SCRATCH_ARMS = (*MEMORY_ARMS, "none", "wide-ffn", "fast-embedding")
RETROFIT_ARMS = (*MEMORY_ARMS, "none", "continued", "bias", "lora")

# The recipe's own multiple for rows, and what it would do for the embedding that a model has anyway.
EMBEDDING_RATE = 5.0
# what results call the held-out side of the data
HELD_OUT = "held out"
# All weights of a trained model at a memory's rate would be forgotten in a few steps.
CONTINUED_RATE = 0.1

# A memory that is attached and never read costs this little.
_NO_ROWS = {"rows_per_head": 2, "head_width": 1}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which arms are trained, and how.

    Args:
        shared: what all arms have in common; its mode and control are the arms' business and stay unset.
        arms: which ones, in the order in which they are trained. seeds: each arm once for each.
        train_from: where lora and continued begin to train; blocks before it stay as they are.
        rates: learning rates of arms that shall not have the shared one.
        texts: further files that every arm is measured on, by the name in the table.
    """

    shared: TrainConfig
    arms: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    train_from: int | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = arms_of(self.shared)
        for arm in (*self.arms, *self.rates):
            if arm not in known:
                kind = "trained from scratch" if self.shared.is_scratch else "that was trained before"
                raise ConfigError(f"A base {kind} has the arms {', '.join(known)}; got {arm!r}.")
        for what, values in (("arm", self.arms), ("seed", self.seeds)):
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"Name each {what} once; got {', '.join(map(str, values)) or 'none'}.")
        for name in ("mode", "control", "lora_rank", "ffn_width", "train_from"):
            if getattr(self.shared, name) is not None:
                raise ConfigError(f"{name} is what arms differ in; leave it out of the shared options.")
        if self.shared.embedding_rate != 1:
            raise ConfigError("embedding_rate is what arms differ in; leave it out of the shared options.")
        if self.train_from is not None and not {"lora", "continued"} & set(known):
            raise ConfigError("train_from has no effect on a scratch base: everything is trained.")
        if HELD_OUT in self.texts:
            raise ConfigError(
                f"{HELD_OUT!r} is what the data's own held-out side is called; name the text otherwise."
            )
        if not self.shared.holdout and not self.texts:
            raise ConfigError("Nothing would be measured: give a holdout above 0, or name texts.")

    def options(self) -> dict[str, Any]:
        """What results depend on, as plain data; arms and seeds may be added later."""
        shared = {k: v for k, v in self.shared.to_json().items() if k not in ("seed", *PER_CALL)}
        return {
            "shared": shared,
            "train_from": self.train_from,
            "rates": dict(self.rates),
            "texts": dict(self.texts),
        }

    def trains(self, arm: str) -> bool:
        """Whether there is anything to train: not where a pretrained base is measured as it is."""
        return arm != "none" or self.shared.is_scratch

    def config(self, arm: str, seed: int, sizes: Sizes, *, minutes: float | None = None) -> TrainConfig:
        """The run of one arm. ConfigError for an arm that trains nothing."""
        if not self.trains(arm):
            raise ConfigError(f"{self.shared.base} is measured as it is in the arm none; there is no run.")
        rate = self.shared.learning_rate * (CONTINUED_RATE if arm == "continued" else 1.0)
        own: dict[str, Any] = {
            "seed": seed,
            "minutes": minutes,
            "layers": sizes.layers,
            "learning_rate": self.rates.get(arm, rate),
            # all arms are measured alike afterwards; inside a run its end is enough
            "eval_every": 10**9,
        }
        memory = self.shared.memory(sizes.layers)
        if arm == "unigram":
            config = control(memory, "unigram")
            own |= {"orders": config.orders, "heads": config.heads, "conv_dilation": config.conv_dilation}
        elif arm in MEMORY_ARMS:
            own["control"] = control(memory, arm).control
        elif arm == "bias":
            own |= {"control": "bias", **_NO_ROWS}
        else:
            own |= {"control": "off", **_NO_ROWS}
            own |= {
                "none": {},
                "wide-ffn": {"ffn_width": sizes.ffn_width},
                "fast-embedding": {"embedding_rate": EMBEDDING_RATE},
                "continued": {"mode": "all", "train_from": self.train_from},
                "lora": {"mode": "lora", "lora_rank": sizes.lora_rank, "train_from": self.train_from},
            }[arm]
        return replace(self.shared, **own)


def arms_of(config: TrainConfig) -> tuple[str, ...]:
    """Every arm that a base can have, in order of what they say about its memory."""
    return SCRATCH_ARMS if config.is_scratch else RETROFIT_ARMS
