"""What a training run is: a frozen, checked record that goes to JSON and back. Needs no torch.

    TrainConfig(base="smollm2", data=("corpus/*.jsonl.xz",), layers=(1, 15), tokens=1_000_000)

The keys are the options of `engram-lm train`, with _ for -. Fields left None are resolved when the run begins, from the
base and the amount of text; the resolved record is what the run's directory keeps, as train.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError

Mode = Literal["memory", "lora", "all"]
SCHEDULES = ("cosine", "linear", "constant")

# Of one call, not of the run: they may differ when a run goes on.
PER_CALL = ("minutes", "device")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Args:
        base: smollm2, scratch:tiny|small|base, a directory, or a hub name.
        data: files or globs of .txt and .jsonl, plain or with .gz or .xz after it.
        field: of a JSONL line, the text. txt_documents: a .txt file is one document, or each line or paragraph is.
        mode: "memory" trains memory alone, the base frozen; "lora" memory and a LoRA adapter; "all" everything. Default
            memory; all for scratch bases, which know nothing yet.
        lora_rank: of the adapter, 8.
        layers: blocks before which memory enters; default block 1 and the middle one.
        train_from: blocks before this one stay frozen, the embedding with them, in modes "lora" and "all".
        profile, orders, heads, rows_per_head, head_width, conv_kernel, conv_dilation, hash_seed, rule: see MemoryConfig.
        control: train a memory that something is missing from, see MemoryConfig.
        ffn_width: of a scratch base, another inner width of its feed-forward layers.
        embedding_rate: the token embedding trains at this multiple of the rate, without weight decay (1: as all else).
        tokens: how many to train on, out of the training side of the data; default all. epochs: passes over them.
        sequence_length: tokens a sequence. batch_size: sequences a forward. accumulation: forwards a step.
        packing: "concat" or "documents", see train.data.
        holdout: share of documents that are never trained on. eval_tokens: at most so many of theirs are measured.
        learning_rate: of projections, adapter and base; rows train at the rule's multiple of it (5 by default).
        warmup: share of the steps over which the rate rises. schedule: how it falls after that.
        weight_decay: on matrices alone: never on rows, handles, norms and convs. clip: largest gradient norm, 0 for none.
        eval_every, save_every: steps; default ten times a run. log_every: steps a line of metrics.jsonl.
        keep_checkpoints: how many are kept.
        seed: of initial values and of the order of the data.
        minutes: stop after this long, with a checkpoint; the same command goes on from there.
        device: "auto" takes an accelerator where there is one; "cpu".
    """

    base: str
    data: tuple[str, ...]
    field: str = "text"
    txt_documents: str = "paragraph"
    mode: Mode | None = None
    lora_rank: int | None = None
    train_from: int | None = None
    layers: tuple[int, ...] | None = None
    profile: str = "paper"
    orders: tuple[int, ...] | None = None
    heads: int | None = None
    rows_per_head: int = 20_011
    head_width: int = 32
    conv_kernel: int | None = None
    conv_dilation: int | None = None
    hash_seed: int | None = None
    rule: str = "row-adam"
    control: str | None = None
    ffn_width: int | None = None
    embedding_rate: float = 1.0
    tokens: int | None = None
    epochs: int = 1
    sequence_length: int = 256
    batch_size: int = 8
    accumulation: int = 1
    packing: str = "concat"
    holdout: float = 0.02
    eval_tokens: int = 16_384
    learning_rate: float = 1e-3
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int | None = None
    keep_checkpoints: int = 2
    seed: int = 0
    minutes: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("data", "layers", "orders"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"{name} is a list; got the string {value!r}.")
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        for name, kinds, kind_name in _KINDS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise ConfigError(f"{name} is {kind_name}; got {value!r}.")
        if not self.data:
            raise ConfigError("data names no files; give at least one with --data.")
        choices = {
            "mode": (None, "memory", "lora", "all"),
            "schedule": SCHEDULES,
            "packing": ("concat", "documents"),
            "txt_documents": ("file", "line", "paragraph"),
            "device": ("auto", "cpu"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(str(choice) for choice in allowed if choice)
                raise ConfigError(f"{name} is one of {listed}; got {getattr(self, name)!r}.")
        least = {
            "lora_rank": 1,
            "train_from": 0,
            "ffn_width": 1,
            "tokens": 1,
            "epochs": 1,
            "sequence_length": 2,
            "batch_size": 1,
            "accumulation": 1,
        }
        least |= {"eval_tokens": 1, "eval_every": 1, "save_every": 1, "log_every": 1, "keep_checkpoints": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"{name} must be at least {lowest}; got {value}.")
        for name in ("learning_rate", "minutes", "embedding_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be greater than 0; got {value}.")
        for name in ("weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be 0 or more; got {getattr(self, name)}.")
        for name in ("warmup", "holdout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is a share, from 0 to below 1; got {getattr(self, name)}.")
        if self.is_scratch and self.mode not in (None, "all"):
            raise ConfigError(
                f"{self.base} begins with random weights, so everything is trained: mode {self.mode!r} would freeze them. "
                "Leave --mode out."
            )
        if self.lora_rank is not None and self.mode != "lora":
            raise ConfigError("lora_rank has no effect without --mode lora.")
        self._check_what_trains()
        # the memory's own checks, before anything is loaded
        self.memory(self.layers or (0,))

    def _check_what_trains(self) -> None:
        """ConfigError for options without effect, and for a run in which nothing would train."""
        mode = self.mode or ("all" if self.is_scratch else "memory")
        if self.ffn_width is not None and not self.is_scratch:
            raise ConfigError(f"ffn_width belongs to scratch bases; {self.base} has its own.")
        if self.train_from is not None and mode == "memory":
            raise ConfigError("train_from has no effect in mode memory, which freezes every block.")
        if self.embedding_rate != 1 and (mode != "all" or self.train_from is not None):
            raise ConfigError("embedding_rate has no effect where the token embedding does not train.")
        if self.control == "off" and mode == "memory":
            raise ConfigError('With control "off" and mode memory nothing trains; choose mode lora or all.')

    @property
    def is_scratch(self) -> bool:
        return self.base.startswith("scratch:")

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.batch_size * self.accumulation

    def memory(self, layers: tuple[int, ...]) -> MemoryConfig:
        """The memory that the run attaches."""
        return MemoryConfig(
            layers=layers,
            profile=self.profile,
            orders=self.orders,
            heads=self.heads,
            rows_per_head=self.rows_per_head,
            head_width=self.head_width,
            conv_kernel=self.conv_kernel,
            conv_dilation=self.conv_dilation,
            control=self.control,
            seed=self.hash_seed,
            rule=self.rule,
        )

    def resolved(self, *, n_blocks: int, steps: int) -> TrainConfig:
        """This record with every None that the base and the number of steps decide filled in."""
        mode = self.mode or ("all" if self.is_scratch else "memory")
        # rounded up: the last tenth is the end of the run
        tenth = -(-steps // 10)
        return replace(
            self,
            mode=mode,
            lora_rank=(self.lora_rank or 8) if mode == "lora" else None,
            layers=self.layers or tuple(sorted({min(1, n_blocks - 1), n_blocks // 2})),
            eval_every=self.eval_every or tenth,
            save_every=self.save_every or tenth,
            log_every=self.log_every or max(1, min(10, steps // 50)),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_json`. Unknown keys raise ConfigError."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ConfigError(
                f"Unknown training option {unknown[0]!r}; known are {', '.join(sorted(known))}."
            )
        if "base" not in data:
            raise ConfigError("A run needs a base: smollm2, scratch:tiny, a directory or a hub name.")
        if not data.get("data"):
            raise ConfigError("A run needs text: name files with --data.")
        return cls(**data)


def read_options(path: str | Path) -> dict[str, Any]:
    """The options in a JSON file, not yet checked. ConfigError where it is no JSON object."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a JSON {type(data).__name__}; wanted an object of training options.")
    return data


def first_difference(one: TrainConfig, other: TrainConfig) -> str | None:
    """The first option in which two runs differ; data is compared by content, not here."""
    for field in fields(TrainConfig):
        if field.name not in (*PER_CALL, "data") and getattr(one, field.name) != getattr(other, field.name):
            return field.name
    return None


_WHOLE = ("lora_rank", "heads", "rows_per_head", "head_width", "conv_kernel", "hash_seed", "tokens", "epochs")
_WHOLE += ("train_from", "ffn_width", "conv_dilation")
_WHOLE += (
    "sequence_length",
    "batch_size",
    "accumulation",
    "eval_tokens",
    "eval_every",
    "save_every",
    "log_every",
)
_WHOLE += ("keep_checkpoints", "seed")
_NUMBER = ("holdout", "learning_rate", "warmup", "weight_decay", "clip", "minutes", "embedding_rate")
_TEXT = ("base", "field", "profile", "rule")
_KINDS: tuple[tuple[str, Any, str], ...] = (
    *((name, int, "a whole number") for name in _WHOLE),
    *((name, (int, float), "a number") for name in _NUMBER),
    *((name, str, "a string") for name in _TEXT),
)
