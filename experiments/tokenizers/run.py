"""Which ways of loading give one tokenizer: fingerprints of a directory, of a GGUF file, of what transformers rebuilds, and
with a token added.

    python experiments/tokenizers/run.py Mistral=DIR Qwen3=DIR SmolLM2=smollm2,FILE.gguf

Each argument names a tokenizer and its sources: a directory with tokenizer.json and tokenizer_config.json, `smollm2` for the
base of that name, a GGUF file. Writes results.json beside this file and draws the table in docs/concepts.md from it.
"""

import json
import re
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from engram_lm.identity import print_of
from engram_lm.identity.tokenizers import first_difference

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "concepts.md"
BEGIN, END = "<!-- tokenizers -->\n", "<!-- end of tokenizers -->"


def ways(sources):
    """(way, tokenizer) of one tokenizer's sources; the first is what the others are compared with."""
    for source in sources:
        path = Path(source)
        if path.suffix == ".gguf":
            read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            yield "GGUF, as transformers reads it", read
            continue
        if source == "smollm2":
            from engram_lm import load_base

            path = Path(load_base("smollm2", report=lambda line: None).tokenizer.name_or_path)
            yield "GGUF, as `load_base` reads it", AutoTokenizer.from_pretrained(path)
        yield "directory, tokenizer.json", Tokenizer.from_file(str(path / "tokenizer.json"))
        rebuilt = AutoTokenizer.from_pretrained(path)
        yield f"rebuilt by transformers ({type(rebuilt).__name__})", rebuilt
        with tempfile.TemporaryDirectory() as saved:
            rebuilt.save_pretrained(saved)
            yield "saved, rebuilt again", AutoTokenizer.from_pretrained(saved)
        for text, special in (("<new_marker>", True), ("Zoomba", False)):
            grown = AutoTokenizer.from_pretrained(path)
            grown.add_tokens([text], special_tokens=special)
            yield f"with the {'marker' if special else 'word'} `{text}` added", grown


def measure(name, sources):
    """One row a way, with the text that tells it from the first."""
    rows, first = [], None
    for way, tokenizer in ways(sources):
        found = print_of(tokenizer)
        first = first or (found, tokenizer)
        row = {"tokenizer": name, "way": way, "text": found.text, "all": found.all, "tokens": found.n_tokens}
        if found.text != first[0].text:
            row["differs on"] = first_difference(first[1], tokenizer)
        rows.append(row)
        print(json.dumps(row, ensure_ascii=False))
    return rows


def table(rows):
    """Markdown: letters name the fingerprints, the same letter the same one."""
    lines = ["| tokenizer | way | text ids | all ids | first text that differs |", "|---|---|---|---|---|"]
    for row in rows:
        of_one = [other for other in rows if other["tokenizer"] == row["tokenizer"]]
        letters = [
            "ABCDEFGH"[list(dict.fromkeys(other[kind] for other in of_one)).index(row[kind])]
            for kind in ("text", "all")
        ]
        differs = row.get("differs on") or ""
        example = re.sub(
            r" {8,}", lambda run: f"({len(run[0])} blanks)", json.dumps(differs, ensure_ascii=False)
        )
        example = f"`{example}`" if differs else ""
        lines.append(f"| {row['tokenizer']} | {row['way']} | {letters[0]} | {letters[1]} | {example} |")
    return "\n".join(lines) + "\n"


def main():
    rows = [
        row for argument in sys.argv[1:] for name, _, sources in [argument.partition("=")]
        for row in measure(name, sources.split(","))
    ]  # fmt: skip
    versions = {package: metadata.version(package) for package in ("tokenizers", "transformers")}
    if rows:
        (HERE / "results.json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    kept = json.loads((HERE / "results.json").read_text())
    before, _, rest = PAGE.read_text(encoding="utf8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(kept["rows"]) + END + rest.partition(END)[2], encoding="utf8")


if __name__ == "__main__":
    main()
