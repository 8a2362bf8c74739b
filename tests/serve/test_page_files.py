"""The page's files without a browser: their size, words in both languages, what the policy forbids, and contrast."""

import re

import pytest

from places import ROOT

PAGE = ROOT / "src" / "engram_lm" / "serve" / "page"
SCRIPTS = sorted(PAGE.glob("*.js"))
HTML = (PAGE / "index.html").read_text()
CSS = (PAGE / "style.css").read_text()


def words() -> dict[str, dict[str, str]]:
    """The two tables of words.js."""
    text = (PAGE / "words.js").read_text()
    found = {}
    for language in ("en", "zh"):
        body = re.search(rf"const {language} = \{{\n(.*?)\n\}};", text, re.DOTALL)[1]
        found[language] = dict(re.findall(r'"?([\w.]+)"?: "([^"]*)"', body))
    return found


def test_the_whole_page_is_light():
    assert sum(file.stat().st_size for file in PAGE.iterdir()) < 150_000


def test_both_languages_say_the_same_things():
    found = words()
    assert len(found["en"]) > 150
    assert set(found["en"]) == set(found["zh"])
    for key, text in found["en"].items():
        names = set(re.findall(r"\{(\w+)", text))
        assert names == set(re.findall(r"\{(\w+)", found["zh"][key])), key


def test_every_word_asked_for_is_there_and_none_is_left_over():
    source = "\n".join(file.read_text() for file in SCRIPTS if file.name != "words.js")
    known = set(words()["en"])
    asked = set(re.findall(r'data-w(?:-label)?="([\w.]+)"', HTML)) | set(
        re.findall(r'word\(\s*"([\w.]+)"', source)
    )
    assert asked <= known
    # Keys that are put together or stand in lists.
    begun = tuple(re.findall(r"`([\w.]+)\$\{", source))
    quoted = set(re.findall(r'"([\w.]+)"', source))
    assert {key for key in known - asked if not key.startswith(begun) and key not in quoted} == set()


def test_nothing_the_policy_forbids():
    assert not re.search(r"<script(?![^>]*\bsrc=)", HTML)
    assert not re.search(r"<style|\sstyle=|\son\w+=", HTML)
    for file in SCRIPTS:
        text = file.read_text()
        assert not re.search(
            r"\.(?:inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
        ), file.name
        assert 'setAttribute("style"' not in text, file.name


def test_nothing_from_outside():
    for file in PAGE.iterdir():
        addresses = set(
            re.findall(
                r"(?:https?:)?//[\w.-]+\.[a-z]{2,}[\w/.]*", re.sub(r"(?m)^\s*//.*$", "", file.read_text())
            )
        )
        assert addresses <= {"http://www.w3.org/2000/svg"}, file.name


# ---- contrast (WCAG 2.1, 1.4.3 and 1.4.11)


def colours(theme: int) -> dict[str, tuple[float, float, float]]:
    pairs = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\);", CSS)
    return {name: tuple(int(both[theme][i : i + 2], 16) / 255 for i in (1, 3, 5)) for name, *both in pairs}


def luminance(colour: tuple[float, float, float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_is_readable_on_every_ground(theme):
    c = colours(theme)
    for ground in ("paper", "raised", "sunk"):
        for text in ("ink", "soft"):
            assert contrast(c[text], c[ground]) >= 4.5, (text, ground)
    for sign in ("memory", "model", "cold", "edge"):
        assert contrast(c[sign], c["raised"]) >= 3, sign


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_a_token_at_full_heat_is_readable(theme):
    c = colours(theme)
    part = float(re.search(r"--tone\) calc\(var\(--heat, 0\) \* (\d+)%\)", CSS)[1]) / 100
    for tone in ("memory", "cold"):
        ground = tuple(part * a + (1 - part) * b for a, b in zip(c[tone], c["raised"], strict=True))
        assert contrast(c["ink"], ground) >= 4.5, tone
