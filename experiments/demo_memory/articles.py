"""Which articles the demo's memory learns, and which it never sees: short ones, in file order, each with a mined fact.

A fact is a probe whose answer is the literal continuation of its prompt in the article; see the data's own README.
"""

import json
import lzma
from pathlib import Path

LONGEST = 1000  # characters; short articles mean many facts a token


def lines_of(path: Path) -> list[dict]:
    with lzma.open(path, "rt", encoding="utf8") as lines:
        return [json.loads(line) for line in lines]


def short_articles(path: Path, n: int, *, ids: set[int] | None = None) -> list[dict]:
    """The first n articles of at most LONGEST characters; of `ids` alone where given."""
    found = []
    with lzma.open(path, "rt", encoding="utf8") as lines:
        for line in lines:
            article = json.loads(line)
            if len(article["text"]) <= LONGEST and (ids is None or article["id"] in ids):
                found.append(article)
            if len(found) == n:
                break
    return found


def probes_of(path: Path, articles: list[dict]) -> list[dict]:
    ids = {article["id"] for article in articles}
    return [probe for probe in lines_of(path) if probe["id"] in ids]


def write_attribution(path: Path, articles: list[dict]) -> None:
    """Which texts the rows were trained on, as their licence asks."""
    lines = [
        "# Attribution",
        "",
        "The rows in this directory were trained on these articles of the English Wikipedia (dump of about early",
        "2014), by Wikipedia contributors, [CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/); the",
        "authors of each are in the history of its page. The text itself is not here. The base model is",
        "SmolLM2-135M-Instruct (Apache-2.0).",
        "",
    ]
    lines += [f"- [{a['title']}](https://en.wikipedia.org/wiki?curid={a['id']})" for a in articles]
    path.write_text("\n".join(lines) + "\n", encoding="utf8")
