"""Draw docs/architecture.svg from the code: rooms on the floors that pyproject.toml gives them, and who imports whom.

    python docs/draw_architecture.py

An arrow is drawn from a room to another that it imports, where no longer way leads there through rooms between.
"""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "engram_lm"
PICTURE = Path(__file__).with_name("architecture.svg")
WIDTH, FLOOR, BOX, MARGIN = 1160, 68, 30, 20
INK, LINE, FILL = "#1f2933", "#9fb3c8", "#eef3f8"


def floors() -> list[list[str]]:
    """Rooms and modules by floor, the top one first, as the import contract orders them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    names = [[name.strip(" ()") for name in layer.split("|")] for layer in layers]
    return [[name for name in layer if _path(name) is not None] for layer in names]


def _path(name: str) -> Path | None:
    folder, file = PACKAGE / name, PACKAGE / f"{name}.py"
    return folder if (folder / "__init__.py").exists() else file if file.exists() else None


def files_of(name: str) -> list[Path]:
    """The Python files of a room."""
    path = _path(name)
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def imports(name: str, rooms: set[str]) -> set[str]:
    """Rooms that a room imports anywhere in it."""
    found = set()
    for file in files_of(name):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                parts = node.module.split(".")
                if parts[0] == "engram_lm":
                    found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {n.name.split(".")[1] for n in node.names if n.name.startswith("engram_lm.")}
    return (found & rooms) - {name}


def reduced(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without arrows where another way leads to the same room."""

    def reach(name: str) -> set[str]:
        return set().union(*(({other} | reach(other)) for other in arrows[name]), set())

    return {
        name: {to for to in others if not any(to in reach(between) for between in others - {to})}
        for name, others in arrows.items()
    }


def draw() -> str:
    """The picture as SVG: the same bytes until a room or an import between rooms comes or goes."""
    layers = [layer for layer in floors() if layer]
    rooms = {name for layer in layers for name in layer}
    arrows = reduced({name: imports(name, rooms) for layer in layers for name in layer})
    place = {}
    for floor, layer in enumerate(layers):
        step = (WIDTH - 2 * MARGIN) / len(layer)
        for n, name in enumerate(layer):
            place[name] = (MARGIN + step * (n + 0.5), MARGIN + floor * FLOOR, min(step - 14, 190))
    height = 2 * MARGIN + (len(layers) - 1) * FLOOR + BOX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
    ]
    for name in sorted(arrows):
        x, y, _ = place[name]
        for other in sorted(arrows[name]):
            to_x, to_y, _ = place[other]
            bend = (y + BOX + to_y) / 2
            parts.append(
                f'<path d="M{x:.0f} {y + BOX} C{x:.0f} {bend:.0f} {to_x:.0f} {bend:.0f} {to_x:.0f} {to_y}" fill="none" '
                f'stroke="{LINE}" marker-end="url(#a)"/>'
            )
    for name, (x, y, width) in place.items():
        parts.append(
            f'<rect x="{x - width / 2:.0f}" y="{y}" width="{width:.0f}" height="{BOX}" rx="5" fill="{FILL}" stroke="{INK}"/>'
            f'<text x="{x:.0f}" y="{y + BOX / 2 + 5:.0f}" text-anchor="middle" fill="{INK}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf8")
    print(f"{PICTURE.name}: {sum(len(layer) for layer in floors())} rooms on {len(floors())} floors")
