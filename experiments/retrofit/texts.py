"""What every arm of the retrofit reads and is asked: made once from the encyclopaedia text, the same for all.

    python experiments/retrofit/texts.py --data DATA --out OUT

    OUT/train.jsonl      openings of articles with facts, REPEATS times over; other openings, once; canaries
    OUT/read.jsonl       the first of these, once each: what was learned by heart, if anything was
    OUT/unseen.jsonl     openings of articles of another shard, cut the same way
    OUT/wikitext2.txt, handbook.jsonl      general text
    OUT/facts.jsonl      the mined facts of the articles in read.jsonl
    OUT/canaries.jsonl   invented secrets (engram_lm.eval.canaries)

An opening is an article's first whole sentences, at most LONGEST characters. Only articles whose opening holds at least two
mined facts are repeated: many facts a token.
"""

import argparse
import json
import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from engram_lm.eval import canaries

ARTICLES, REPEATS, ONCE, LONGEST = 64, 6, 110, 460
CANARIES = {"each": 4, "repeats": (1, 4, 16, 64), "controls": 8, "seed": 0}


def lines_of(path: Path) -> Iterator[dict]:
    with lzma.open(path, "rt", encoding="utf8") as lines:
        for line in lines:
            yield json.loads(line)


def opening(text: str) -> str:
    """The first whole sentences of a text, at most LONGEST characters; empty where the first is longer."""
    cut = text[:LONGEST]
    if len(text) <= LONGEST:
        return cut
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", cut)]
    return cut[: ends[-1]] if ends else ""


def with_facts(data: Path) -> tuple[list[dict], list[dict]]:
    """(articles, facts): the first ARTICLES whose opening holds at least two facts."""
    facts: dict[int, list[dict]] = {}
    for fact in lines_of(data / "probes/enwiki2014_probes.jsonl.xz"):
        if fact["shard"] == "train-00":
            facts.setdefault(fact["id"], []).append(fact)
    articles, asked = [], []
    for article in lines_of(data / "corpora/enwiki2014-train-00.jsonl.xz"):
        text = opening(article["text"])
        held = [fact for fact in facts.get(article["id"], ()) if f"{fact['prompt']} {fact['answer']}" in text]
        if len(held) >= 2:
            articles.append({"id": article["id"], "title": article["title"], "text": text})
            asked += held
        if len(articles) == ARTICLES:
            break
    return articles, asked


def openings(path: Path, count: int, *, but: Iterable[int] = ()) -> list[dict]:
    """The openings of the first `count` articles that are long enough to be like those with facts."""
    skipped, found = set(but), []
    for article in lines_of(path):
        text = opening(article["text"])
        if len(text) >= LONGEST // 2 and article["id"] not in skipped:
            found.append({"id": article["id"], "title": article["title"], "text": text})
        if len(found) == count:
            break
    return found


def write(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data, out = options.data, options.out
    out.mkdir(parents=True, exist_ok=True)
    articles, facts = with_facts(data)
    read = {article["id"] for article in articles}
    once = openings(data / "corpora/enwiki2014-train-00.jsonl.xz", ONCE, but=read)
    secrets = canaries.make(**CANARIES)
    documents = [
        *(article for article in articles for _ in range(REPEATS)),
        *once,
        *({"text": text} for text in canaries.documents(secrets)),
    ]
    write(out / "train.jsonl", documents)
    write(out / "read.jsonl", articles)
    write(out / "unseen.jsonl", openings(data / "corpora/enwiki2014-valid.jsonl.xz", 80))
    write(out / "facts.jsonl", facts)
    canaries.write(secrets, out / "canaries.jsonl")
    write(out / "handbook.jsonl", list(lines_of(data / "domain/handbook18f.jsonl.xz"))[:12])
    with lzma.open(data / "corpora/wikitext2-test.txt.xz", "rt", encoding="utf8") as lines:
        (out / "wikitext2.txt").write_text(lines.read(60_000), encoding="utf8")
    print(
        f"{len(articles)} articles with {len(facts)} facts, {len(once)} read once, {len(documents)} documents"
    )


if __name__ == "__main__":
    main()
