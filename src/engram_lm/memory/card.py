"""The README.md beside a saved memory: a model card."""

from typing import Any


def card(manifest: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read, from memory.json."""
    lines = [
        "---",
        "library_name: engram-lm",
        f"base_model: {manifest['base']['name']}",
        "---",
        "",
        "# Engram memory",
        "",
    ]
    lines += [
        f"Conditional memory for `{manifest['base']['name']}` (weights {manifest['base']['sha256'][:12]}).",
        "",
    ]
    for entry in manifest["memories"]:
        if entry["config"].get("control"):
            lines += [
                f"**`{entry['config']['name']}` is a control for comparisons, {entry['config']['control']}: "
                "not an ordinary memory.**",
                "",
            ]
    lines += ["| memory | block | rows | width | row updates | identity |", "|---|---|---|---|---|---|"]
    for entry in manifest["memories"]:
        for table in entry["tables"]:
            lines.append(
                f"| {entry['config']['name']} | {table['block']} | {table['rows']:,} | {table['width']} | "
                f"{table['updates']:,} | `{table['identity'][:12]}` |"
            )
    lines += [
        "",
        "```python",
        "import engram_lm",
        "",
        "model = engram_lm.from_pretrained(DIRECTORY)",
        "```",
        "",
    ]
    return "\n".join(lines)
