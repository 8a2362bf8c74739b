"""What a measure returns: numbers with the state of the memory, intervals, counts, and the settings they came from.

    Measured("perplexity", values=(Value("perplexity", of="wiki.txt", memory="on", value=12.3, interval=(11.8, 12.9),
             count=20_000, unit="tokens"),), settings={"window": 512})

As a file: DIR/MEASURE.json, written whole. A file with the same settings is not measured again.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engram_lm.durable import write_atomic
from engram_lm.errors import ConfigError, DataError

FORMAT, VERSION = "engram-lm eval", 1


@dataclass(frozen=True)
class Value:
    """One number.

    name: what it is, such as "perplexity". of: of which texts, relation or bucket. memory: the state of the memory (see
    `subject.STATES`), or one of its layers, or the baseline. interval: 95 %, None where there is none. count: how many
    `unit`s it is of.
    """

    name: str
    of: str
    memory: str
    value: float | None
    count: int
    unit: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Result:
    """All numbers of one measure. settings: plain data that they depend on. notes: sentences for the report."""

    measure: str
    values: tuple[Value, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    def value(self, name: str, *, of: str = "", memory: str = "on") -> Value:
        """The one value of this name, group and state; KeyError where there is none."""
        for one in self.values:
            if (one.name, one.of, one.memory) == (name, of, memory):
                return one
        raise KeyError((name, of, memory))

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **plain(asdict(self))}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Result":
        """The inverse of `to_json`."""
        values = tuple(
            Value(**{**value, "interval": None if value["interval"] is None else tuple(value["interval"])})
            for value in data["values"]
        )
        return cls(
            data["measure"], values, data["settings"], tuple(data["notes"]), data["seconds"], data["facts"]
        )


def save(measured: Result, directory: Path) -> Path:
    """Write DIR/MEASURE.json, whole."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{measured.measure}.json"
    write_atomic(path, json.dumps(measured.to_json(), indent=1, ensure_ascii=False) + "\n")
    return path


def load(path: Path) -> Result:
    """Read what `save` wrote; DataError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf8"))
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise ValueError(f"format {data['format']!r} {data['version']!r}")
        return Result.from_json(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no result of engram-lm eval ({error}); move it away or give --overwrite."
        ) from None


def finished(measure: str, settings: dict[str, Any], directory: Path) -> Result | None:
    """The result that `directory` holds of these settings; None where there is none, ConfigError for other settings."""
    path = directory / f"{measure}.json"
    if not path.exists():
        return None
    found, wanted = load(path), plain(settings)
    for name in sorted(wanted.keys() | found.settings.keys()):
        if found.settings.get(name) != wanted.get(name):
            raise ConfigError(
                f"{path} was measured with another {name} ({_short(found.settings.get(name))}, not "
                f"{_short(wanted.get(name))}); give --overwrite or another --out."
            )
    return found


def plain(value: Any) -> Any:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
