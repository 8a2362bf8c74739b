"""What a training run is: a frozen, checked record that goes to JSON and back. Needs no torch.

    TrainConfig(base="smollm2", data=("corpus/*.jsonl.xz",), layers=(1, 15), tokens=1_000_000)

The keys are the options of `engram-lm train`, with _ for -. Fields left None are resolved when the run begins, from the
base and the amount of text; the resolved record is what the run's directory keeps, as train.json.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError

Mode = Literal["memory", "lora", "all"]
Control = Literal["one-row", "shuffled", "frozen-random", "bias", "off"]

# Of one call, not of the run: they may differ when a run goes on.
PER_CALL = ("minutes", "device")


def option(
    help: str,
    default: Any = None,
    *,
    otherwise: str | None = None,
    least: int | None = None,
    above_0: bool = False,
    from_0: bool = False,
    share: bool = False,
) -> Any:
    """A field of TrainConfig that is an option of `engram-lm train`: what it is, its default, and which values it takes.

    otherwise: what is taken where the field is None, for the help. least: of a whole number. above_0, from_0: a number above
    0, or 0 and more. share: from 0 to below 1.
    """
    shown = otherwise if otherwise is not None else "" if default is None else str(default)
    facts = {
        "help": f"{help} ({shown})." if shown else f"{help}.",
        "least": least, "above_0": above_0, "from_0": from_0, "share": share,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=facts)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Every field is said in its `option`, for this class, for the command's help and for its checks."""

    base: str
    data: tuple[str, ...]
    field: str = option("Field of a JSONL line that holds the text", "text")
    txt_documents: Literal["file", "line", "paragraph"] = option(
        "What a document of a .txt file is", "paragraph"
    )
    mode: Mode | None = option(
        "What trains: memory alone, memory and a LoRA adapter, or all",
        otherwise="memory; all for scratch bases",
    )
    lora_rank: int | None = option("Rank of the adapter", otherwise="8", least=1)
    train_from: int | None = option(
        "Blocks before this one, and the embedding, stay frozen in modes lora and all",
        otherwise="none",
        least=0,
    )
    layers: tuple[int, ...] | None = option(
        "Blocks before which memory enters, from 0, with commas", otherwise="1 and the middle one"
    )
    profile: str = option("Address scheme", "paper")
    orders: tuple[int, ...] | None = option("N-gram lengths, with commas", otherwise="the profile's, 2,3")
    heads: int | None = option("Hash heads of each order", otherwise="the profile's, 8")
    rows_per_head: int = option("Rows of each head", 20_011)
    head_width: int = option("Numbers a row", 32)
    conv_kernel: int | None = option("Taps of the short conv, 0 for none", otherwise="the profile's, 4")
    conv_dilation: int | None = option("Tokens between its taps", otherwise="the highest order")
    hash_seed: int | None = option("Seed of the hash multipliers", otherwise="the profile's")
    rule: str = option(
        "How rows train: row-adam, row-adam-momentum, row-momentum-sinkhorn, row-rmsprop or sgd", "row-adam"
    )
    control: Control | None = option(
        "Train a memory that something is missing from, to compare with; engram-lm ablate trains them all"
    )
    ffn_width: int | None = option(
        "Of a scratch base: another inner width of its feed-forward layers", least=1
    )
    embedding_rate: float = option(
        "The token embedding trains at this multiple of the rate, without weight decay", 1.0,
        otherwise="1: as all else", above_0=True,
    )  # fmt: skip
    tokens: int | None = option("How many tokens to train on", otherwise="all of the training side", least=1)
    epochs: int = option("Passes over them", 1, least=1)
    sequence_length: int = option("Tokens a sequence", 256, least=2)
    batch_size: int = option("Sequences a forward", 8, least=1)
    accumulation: int = option("Forwards a step", 1, least=1)
    packing: Literal["concat", "documents"] = option(
        "Sequences cut from one stream, or with documents kept apart", "concat"
    )
    holdout: float = option("Share of the documents that is never trained on and measured", 0.02, share=True)
    eval_tokens: int = option("Most held-out tokens measured at a time", 16_384, least=1)
    learning_rate: float = option("Highest rate; rows train at 5 times it", 1e-3, above_0=True)
    warmup: float = option("Share of the steps over which the rate rises", 0.05, share=True)
    schedule: Literal["cosine", "linear", "constant"] = option("How the rate falls after that", "cosine")
    weight_decay: float = option("On matrices, never on rows", 0.0, otherwise="0", from_0=True)
    clip: float = option("Largest gradient norm, 0 for none", 1.0, otherwise="1", from_0=True)
    eval_every: int | None = option("Steps between measurements", otherwise="a tenth of the run", least=1)
    save_every: int | None = option("Steps between checkpoints", otherwise="a tenth of the run", least=1)
    log_every: int | None = option(
        "Steps a line of metrics.jsonl", otherwise="10, fewer in a short run", least=1
    )
    keep_checkpoints: int = option("How many checkpoints stay", 2, least=1)
    seed: int = option("Of initial values and the order of the text", 0)
    minutes: float | None = option(
        "Stop after this long with a checkpoint; the same command goes on", above_0=True
    )
    device: Literal["auto", "cpu"] = option("auto takes an accelerator where there is one", "auto")

    def __post_init__(self) -> None:
        for name in ("data", "layers", "orders"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"{name} is a list; got the string {value!r}.")
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        for name, (kind, _) in kinds_of(TrainConfig).items():
            value = getattr(self, name)
            wanted = {
                int: (int, "a whole number"),
                float: ((int, float), "a number"),
                str: (str, "a string"),
            }.get(kind)
            if wanted and value is not None and (not isinstance(value, wanted[0]) or isinstance(value, bool)):
                raise ConfigError(f"{name} is {wanted[1]}; got {value!r}.")
        if not self.data:
            raise ConfigError("data names no files; give at least one with --data.")
        for field in fields(TrainConfig):
            self._check(field)
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

    def _check(self, field: dataclasses.Field) -> None:
        """ConfigError where a value is not one that its option takes. The memory's own are MemoryConfig's to check."""
        name, value, facts = field.name, getattr(self, field.name), field.metadata
        kind, optional = kinds_of(TrainConfig)[name]
        if get_origin(kind) is Literal and name != "control":
            if value not in get_args(kind) and not (value is None and optional):
                raise ConfigError(f"{name} is one of {', '.join(get_args(kind))}; got {value!r}.")
        if value is None or not facts:
            return
        if facts["least"] is not None and value < facts["least"]:
            raise ConfigError(f"{name} must be at least {facts['least']}; got {value}.")
        if facts["above_0"] and not value > 0:
            raise ConfigError(f"{name} must be greater than 0; got {value}.")
        if facts["from_0"] and not value >= 0:
            raise ConfigError(f"{name} must be 0 or more; got {value}.")
        if facts["share"] and not 0 <= value < 1:
            raise ConfigError(f"{name} is a share, from 0 to below 1; got {value}.")

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


@functools.cache
def kinds_of(config: type) -> dict[str, tuple[Any, bool]]:
    """field name -> (its type without None, whether it may be None)."""
    found = {}
    for name, hint in get_type_hints(config).items():
        parts = [part for part in get_args(hint) if part is not type(None)]
        optional = len(parts) < len(get_args(hint))
        found[name] = (parts[0] if optional else hint), optional
    return found
