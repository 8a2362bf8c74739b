"""Rows in files, a line each and a file an arm, so that a stopped run goes on where it was.

    kept = Kept(out, settings)         # ConfigError where OUT was made with other settings
    if not kept.has("memory", "leave.md"):
        kept.add({"arm": "memory", "window": "leave.md", ...}, key="leave.md")
    kept.rows("memory")

Of rows of one arm, key and index the last one counts.
"""

import json
from pathlib import Path
from typing import Any

from engram_lm.durable import write_atomic
from engram_lm.errors import ConfigError

SETTINGS = "settings.json"


class ResultRows:
    """Rows below a directory. settings: what the rows depend on, plain data."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / SETTINGS
        settings = json.loads(json.dumps(settings))
        if path.exists():
            before = json.loads(path.read_text(encoding="utf8"))
            for name in sorted(settings.keys() | before.keys()):
                if before.get(name) != settings.get(name):
                    raise ConfigError(
                        f"{directory} holds a run with another {name} ({_short(before.get(name))}, not "
                        f"{_short(settings.get(name))}); name another --out."
                    )
        else:
            write_atomic(path, json.dumps(settings, indent=1) + "\n")
        self._known: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}

    def has(self, arm: str, key: str) -> bool:
        return key in self._read(arm)

    def add(self, row: dict[str, Any], *, key: str) -> None:
        """Keep a row of row["arm"]."""
        row = {"key": key, **row}
        known = self._read(row["arm"])
        with open(self._path(row["arm"]), "a", encoding="utf8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        known.setdefault(key, {})[row.get("index", "")] = row

    def rows(self, arm: str) -> list[dict[str, Any]]:
        return [row for rows in self._read(arm).values() for row in rows.values()]

    def _path(self, arm: str) -> Path:
        return self.directory / f"{arm.replace(' ', '-').replace(',', '')}.jsonl"

    def _read(self, arm: str) -> dict[str, dict[str, dict[str, Any]]]:
        if arm not in self._known:
            self._known[arm] = {}
            path = self._path(arm)
            if path.exists():
                data = path.read_bytes()
                whole = data[: data.rfind(b"\n") + 1]
                if whole != data:  # stopped in the middle of a line
                    write_atomic(path, whole)
                # bytes: some strings hold line separators that str.splitlines() would cut at
                for line in whole.splitlines():
                    row = json.loads(line)
                    self._known[arm].setdefault(row["key"], {})[row.get("index", "")] = row
        return self._known[arm]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
