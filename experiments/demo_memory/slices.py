"""The texts and facts that `engram-lm eval` measures the demo's memory on, cut from the data.

    python experiments/demo_memory/slices.py --data DATA --out SLICES --articles 250

read.jsonl (the articles it read), unread.jsonl (articles it never saw), handbook.jsonl, and facts.jsonl (facts of the
articles it read). The texts are not part of this repository.
"""

import argparse
import json
from pathlib import Path

from articles import lines_of, probes_of, short_articles


def write(path: Path, records: list[dict]) -> None:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--articles", type=int, required=True, help="as many as the training read")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    probes_file, corpora = options.data / "probes/enwiki2014_probes.jsonl.xz", options.data / "corpora"
    with_fact = {probe["id"] for probe in lines_of(probes_file)}
    read = short_articles(corpora / "enwiki2014-train-00.jsonl.xz", options.articles, ids=with_fact)
    unread = short_articles(corpora / "enwiki2014-valid.jsonl.xz", options.articles)
    handbook = [
        {"text": page["text"][:1000]} for page in lines_of(options.data / "domain/handbook18f.jsonl.xz")
    ]
    write(options.out / "read.jsonl", [{"text": article["text"]} for article in read])
    write(options.out / "unread.jsonl", [{"text": article["text"]} for article in unread])
    write(options.out / "handbook.jsonl", handbook)
    write(options.out / "facts.jsonl", probes_of(probes_file, read))


if __name__ == "__main__":
    main()
