"""Files, headings and tests that README and docs name are there."""

import re
from pathlib import Path

import pytest

pytest.importorskip("sybil")

from printed.pages import PAGES, ROOT, name_of

_FOLDERS = "src|tests|benchmarks|docs|experiments"


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_paths_lead_somewhere(page):
    text = without_blocks(page)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    missing = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    # a pattern of names (`*`) is none
    paths = re.findall(rf"(?<![\w/.-])((?:{_FOLDERS})/[\w/.-]*\w)(?![\w/*-])", text)
    assert missing + [path for path in paths if not (ROOT / path).exists()] == []


def test_a_heading_is_found_as_github_names_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Perplexity: `--text`, `--training`\n\n## The gate\n")
    assert anchors(page) == {"perplexity---text---training", "the-gate"}
