"""The page in a real browser: every panel at desktop and phone width, by mouse and keyboard, with every error it can meet.

The fast-answering server of page_server.py stands behind most of it; the last test has `engram-lm serve` itself.
Needs Debian's chromium (apt-get install chromium fonts-noto-cjk) and playwright from the dev extra.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from page_server import HANDBOOK, PageServer

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in the dev extra")
expect = sync_api.expect
# of patience: two cores may be shared with much else
SECONDS = 30
expect.set_options(timeout=SECONDS * 1000)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium fonts-noto-cjk"),
]

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
both_widths = pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    with PageServer() as server:
        yield server


@contextmanager
def opened(
    browser, url: str, *, size: dict = DESKTOP, allowed: str = "", hash_: str = "", **context
) -> Iterator:
    """A page that must log no error. allowed: a pattern of messages that this test provokes."""
    context = browser.new_context(viewport=size, locale=context.pop("locale", "en-GB"), **context)
    context.set_default_timeout(SECONDS * 1000)
    page = context.new_page()
    errors: list[str] = []
    page.on(
        "console",
        lambda message: errors.append(message.text) if message.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url + hash_)
    page.wait_for_selector("body[data-ready]", timeout=120_000)
    yield page
    context.close()
    assert [one for one in errors if not (allowed and re.search(allowed, one))] == []


def fits(page) -> None:
    """Nothing sticks out to the right of the window."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("innerWidth")


# ---- Look


@both_widths
def test_look_by_mouse(browser, server, size):
    with opened(browser, server.url, size=size) as page:
        page.get_by_role("button", name="A page of the handbook").click()
        tokens = page.locator("#look-tokens").get_by_role("option")
        expect(page.locator("#look-status")).to_contain_text("tokens in")
        assert page.locator("#look-tokens .strip").text_content() == HANDBOOK
        heats = page.eval_on_selector_all(
            "#look-tokens .tok", "all => all.map((t) => Number(t.style.getPropertyValue('--heat')))"
        )
        assert max(heats) > 0.5 > min(heats)
        # The label says what the colour says.
        hottest = page.locator("#look-tokens .tok").nth(heats.index(max(heats))).get_attribute("aria-label")
        assert float(hottest.rpartition("r ")[2]) == pytest.approx(max(heats), abs=0.01)
        tokens.nth(6).click()
        card = page.locator("#look-card")
        expect(card).to_contain_text("before it: found")
        expect(card).to_contain_text("Layer 8")
        expect(card.locator("mark").first).to_be_visible()
        page.get_by_role("button", name="Close the details").click()
        expect(card).not_to_contain_text("Layer 8")
        fits(page)


def test_look_shows_every_layer_and_branch(browser, server):
    with opened(browser, server.url) as page:
        page.get_by_role("button", name="Trace").click()
        expect(page.locator("#look-status")).to_contain_text("tokens in")
        expect(page.locator("#look-status")).not_to_contain_text("follows")
        names = page.locator("#look-measure option").all_text_contents()
        assert {
            "gate of layer 1, branch 1",
            "gate of layer 8, branch 2",
            "gates, mean of all",
            "added by layer 8",
            "loss saved by both",
        } <= set(names)
        before = page.locator("#look-tokens .tok").nth(5).get_attribute("aria-label")
        page.select_option("#look-measure", label="loss saved by the tables")
        assert page.locator("#look-tokens .tok").nth(5).get_attribute("aria-label") != before
        assert page.locator("#look-tokens .tok.cold").count() > 0
        assert page.locator("#look-plots .plot").count() == 1
        page.select_option("#look-measure", label="gate of layer 1, branch 2")
        assert page.locator("#look-plots .plot").count() == 2
        expect(page.locator("#look-plots")).to_contain_text("Spearman")


def test_what_the_tables_saved_follows_the_heat(browser, server):
    with opened(browser, server.url) as page:
        held = []

        def hold(route) -> None:
            held.append(route)

        page.route("**/api/losses", hold)
        page.get_by_role("button", name="A page of the handbook").click()
        expect(page.locator("#look-status")).to_contain_text("what the tables saved follows")
        page.locator("#look-tokens .tok").nth(6).click()
        card, label = page.locator("#look-card"), "loss saved by the tables"
        expect(card.locator(".losses")).to_contain_text("Loss without memory…")
        expect(card.locator(".losses")).not_to_contain_text("saved")
        assert label not in page.locator("#look-measure option").all_text_contents()
        chosen = page.locator("#look-measure").input_value()
        held[0].continue_()
        expect(card.locator(".losses")).to_contain_text("saved")
        expect(page.locator("#look-status")).not_to_contain_text("follows")
        assert label in page.locator("#look-measure option").all_text_contents()
        assert page.locator("#look-measure").input_value() == chosen
        expect(page.locator("#look-plots .dot.on").first).to_be_visible()


def test_the_correlations_are_right(browser, server):
    with opened(browser, server.url) as page:
        r, rho, flat = page.evaluate(
            """async () => {
                const { pearson, spearman } = await import("/static/scatter.js");
                const ranked = spearman([1, 10, 10, 400], [2, 3, 3, 4]);
                return [pearson([1, 2, 3, 4], [1, 3, 2, 5]), ranked, pearson([1, 1, 1], [1, 2, 3])];
            }"""
        )
        assert r == pytest.approx(0.8315218406202999)
        assert rho == pytest.approx(1)
        assert flat is None


@both_widths
def test_look_by_keyboard(browser, server, size):
    with opened(browser, server.url, size=size) as page:
        page.locator("#look-text").focus()
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#look-tokens .tok")
        here = "document.activeElement.dataset.text ?? document.activeElement.id"
        page.locator("#look-measure").focus()
        page.keyboard.press("Tab")
        texts = page.eval_on_selector_all("#look-tokens .tok", "all => all.map((t) => t.dataset.text)")
        assert page.evaluate(here) == texts[0]
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.evaluate(here) == texts[2]
        page.keyboard.press("Enter")
        expect(page.locator("#look-card-title")).to_contain_text(texts[2].strip())
        page.keyboard.press("Escape")
        expect(page.locator("#look-card-title")).to_have_text("One token")
        assert page.evaluate(here) == texts[2]
        page.keyboard.press("End")
        assert page.evaluate(here) == texts[-1]
        page.keyboard.press("Home")
        page.keyboard.press("ArrowDown")
        below = page.evaluate(
            "document.activeElement.getBoundingClientRect().top - document.querySelector('.tok').getBoundingClientRect().top"
        )
        assert below > 10


def test_tabs_by_keyboard(browser, server):
    with opened(browser, server.url) as page:
        page.keyboard.press("Tab")
        expect(page.locator(".skip")).to_be_focused()
        page.locator("#tab-look").focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#tab-think")).to_be_focused()
        expect(page.locator("#think")).to_be_visible()
        page.keyboard.press("End")
        expect(page.locator("#quiz")).to_be_visible()
        assert page.url.endswith("#/quiz")


# ---- Think or look up


@both_widths
def test_think_lists_and_candidates(browser, server, size):
    with opened(browser, server.url, size=size, hash_="#/think") as page:
        page.get_by_role("button", name="Who was the first US president?").click()
        expect(page.locator("#think-lists table")).to_have_count(3)
        expect(page.locator("#think-lists caption").nth(2)).to_have_text("Mix, λ 0.62")
        expect(page.locator("#think-lambda")).to_have_attribute("aria-valuetext", "0.62, set by the gate")
        expect(page.locator("#think-sources")).to_contain_text("<b>Washington</b>")
        p = page.locator(".chances tbody tr").nth(0).locator("td").nth(1)
        resting = p.text_content()
        # P moves in the page, before the server can have been asked.
        moved = page.evaluate(
            """() => [0, 30, 95].map((value) => {
                const slider = document.getElementById("think-lambda");
                slider.value = value;
                slider.dispatchEvent(new Event("input"));
                return document.querySelector(".chances tbody tr").children[2].textContent;
            })"""
        )
        assert len({resting, *moved}) == 4
        expect(page.locator("#think-lists caption").nth(2)).to_have_text("Mix, λ 0.95")
        page.get_by_role("button", name="Gate's λ").click()
        assert p.text_content() == resting
        expect(page.locator("#think-lists caption").nth(2)).to_have_text("Mix, λ 0.62")
        fits(page)


def test_the_chance_of_a_candidate_is_the_product_of_mixtures(browser, server):
    with opened(browser, server.url) as page:
        pinned, own = page.evaluate(
            """async () => {
                const { chanceOf } = await import("/static/chances.js");
                const tokens = [{ p_model: 0.5, p_memory: 1, lambda: 0.2 }, { p_model: 0.1, p_memory: 0, lambda: 0.5 }];
                return [chanceOf(tokens, 0.4), chanceOf(tokens, null)];
            }"""
        )
        assert pinned == pytest.approx((0.6 * 0.5 + 0.4) * (0.6 * 0.1))
        assert own == pytest.approx((0.8 * 0.5 + 0.2) * (0.5 * 0.1))


def test_generation_waits_streams_and_stops(browser):
    with PageServer(token_s=0.15, before=2) as server, opened(browser, server.url, hash_="#/think") as page:
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#think-writer-status")).to_have_text("2 before you")
        page.locator("#think-tokens .tok").nth(2).wait_for()
        stop = page.get_by_role("button", name="Stop")
        stop.click()
        expect(page.locator("#think-writer-status")).to_have_text("Stopped.")
        expect(stop).to_be_hidden()
        count = page.locator("#think-tokens .tok").count()
        page.wait_for_timeout(500)
        assert page.locator("#think-tokens .tok").count() == count
        assert server.cut_short == 1, "the connection was closed"


def test_generation_to_its_end(browser, server):
    with opened(browser, server.url, hash_="#/think") as page:
        page.locator("#think-prompt").fill("Annual leave at Brindle & Ash is")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#think-writer-status")).to_contain_text("the first after 96 ms")
        expect(page.locator("#think-tokens .tok").first).to_have_attribute(
            "aria-label", re.compile(r"r 0\.\d\d")
        )
        assert page.locator("#think-live").text_content().strip().startswith("27 days")
        page.locator("#think-tokens .tok").first.focus()
        expect(page.locator("#think-told")).to_contain_text("match of 7 tokens, 1 time in 1 document")
        page.locator("#think-index").uncheck()
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#think-tokens")).to_contain_text("debate")
        assert server.asked[-1][1]["arm"] == "alone"


# ---- Teach


@both_widths
def test_teach_ask_delete_ask_again(browser, server, size):
    with opened(browser, server.url, size=size, hash_="#/teach") as page:
        page.get_by_role("button", name="Add an example and see").click()
        expect(page.locator("#teach-log")).to_contain_text("indexed")
        expect(page.locator("#teach-documents")).to_contain_text("observatory.md")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator("#teach-ask-status")).to_have_text("Delete a document and ask again.")
        expect(page.locator('[data-arm="memory"]')).to_contain_text("Odalys Brandt")
        expect(page.locator('[data-arm="alone"]')).not_to_contain_text("Odalys Brandt")
        expect(page.locator('[data-arm="retrieval"]')).to_contain_text("prompt tokens")
        expect(page.locator("#teach-log")).to_contain_text("found in 1 document, match of 7 tokens, λ 0.")
        fits(page)
        page.get_by_role("button", name="Delete observatory.md").click()
        expect(page.locator("#teach-documents")).not_to_contain_text("observatory.md")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator('[data-arm="memory"]')).to_contain_text("debate")
        expect(page.locator("#teach-log")).to_contain_text("memory had no part in this answer")


def test_files_are_read_as_utf8_or_refused(browser, server):
    with opened(browser, server.url, hash_="#/teach") as page:
        page.set_input_files(
            "#teach-files",
            [
                {"name": "latin.txt", "mimeType": "text/plain", "buffer": "Müller".encode("latin1")},
                {"name": "empty.txt", "mimeType": "text/plain", "buffer": b" \n"},
                {"name": "huge.txt", "mimeType": "text/plain", "buffer": b"a " * 400_000},
                {
                    "name": "fine.txt",
                    "mimeType": "text/plain",
                    "buffer": "Müller wohnt hier. 张仲景".encode(),
                },
            ],
        )
        log = page.locator("#teach-log")
        expect(log).to_contain_text("latin.txt is not UTF-8 text. Save it as UTF-8 and drop it again.")
        expect(log).to_contain_text("empty.txt is empty.")
        expect(log).to_contain_text("huge.txt is 800 KB; at most 300 KB fit into one request.")
        expect(page.locator("#teach-documents")).to_contain_text("fine.txt")
        assert server.documents["fine.txt"] == "Müller wohnt hier. 张仲景"


def test_a_dropped_file_is_added(browser, server):
    with opened(browser, server.url, hash_="#/teach") as page:
        page.wait_for_selector("#teach-documents tbody tr")
        drop = """(zone) => {
            const dropped = new DataTransfer();
            dropped.items.add(new File(["A dropped sentence."], "dropped.txt", { type: "text/plain" }));
            zone.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true }));
        }"""
        page.locator("#teach-drop").evaluate(drop)
        expect(page.locator("#teach-documents")).to_contain_text("dropped.txt")
        assert server.documents["dropped.txt"] == "A dropped sentence."


def test_deleting_twice_is_told(browser, server):
    with opened(browser, server.url, hash_="#/teach", allowed="404") as page:
        page.get_by_role("button", name="Delete handbook.md").wait_for()
        del server.documents["handbook.md"]
        page.get_by_role("button", name="Delete handbook.md").click()
        expect(page.locator("#teach-status")).to_contain_text("may have been deleted already")
        expect(page.locator("#teach-documents")).to_contain_text("No documents yet.")


def test_html_stays_text(browser, server):
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script> <b>bold</b>'
    with opened(browser, server.url, hash_="#/teach") as page:
        page.locator("#teach-name").fill("<i>evil</i>")
        page.locator("#teach-text").fill(evil)
        page.get_by_role("button", name="Add to memory").click()
        expect(page.locator("#teach-documents")).to_contain_text("<i>evil</i>")
        page.locator("#tab-look").click()
        page.locator("#look-text").fill(evil)
        page.get_by_role("button", name="Trace").click()
        page.wait_for_selector("#look-tokens .tok")
        page.locator("#look-tokens .tok").nth(3).click()
        page.wait_for_selector("#look-card mark")
        assert page.locator("#look-tokens .strip").text_content() == evil
        assert page.locator("main img, main script").count() == 0
        assert page.title() == "Engram"


# ---- Quiz


@both_widths
def test_quiz_counts_both_kinds_apart(browser, server, size):
    with opened(browser, server.url, size=size, hash_="#/quiz") as page:
        page.locator("#quiz-answer").fill("It is 27 days.")
        page.keyboard.press("Enter")
        expect(page.locator("#quiz .status")).to_have_text("Right: You, Retrieval, Memory.")
        page.get_by_role("button", name="Next question").click()
        expect(page.locator("#quiz-question")).to_contain_text("other words")
        page.get_by_role("button", name="I do not know").click()
        expect(page.locator("#quiz .status")).to_have_text("Right: Retrieval.")
        rows = page.locator("#quiz-scores tbody tr").all_text_contents()
        assert rows == [
            "You1 / 10 / 1",
            "Model alone0 / 10 / 1",
            "Retrieval1 / 11 / 1",
            "Memory1 / 10 / 1",
        ]
        fits(page)
        for _ in range(3):
            page.locator("#quiz-next").click()
        expect(page.locator("#quiz-question")).to_contain_text("That was the last question")


# ---- what can go wrong


def test_every_refusal_is_told(browser, server):
    with opened(browser, server.url, allowed="429|500|Failed to load") as page:
        page.locator("#look-text").fill(" \n ")
        page.get_by_role("button", name="Trace").click()
        expect(page.locator("#look-status")).to_contain_text("There is no text to trace.")
        server.refuse(
            "/api/trace", 429, "64 requests are waiting for the model already; try again in a moment."
        )
        page.locator("#look-text").fill("words")
        page.get_by_role("button", name="Trace").click()
        expect(page.locator("#look-status")).to_have_text(
            "64 requests are waiting for the model already; try again in a moment."
        )
        server.refuse("/api/generate", 500, "Something went wrong inside the server.")
        page.locator("#tab-think").click()
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#think-writer-status")).to_have_text("Something went wrong inside the server.")
        assert page.locator("#think-writer-status").get_attribute("data-kind") == "error"


def test_a_megabyte_of_text(browser, server):
    with opened(browser, server.url, allowed="413") as page:
        page.locator("#look-text").fill("a word or two " * 75_000)
        page.get_by_role("button", name="Trace").click()
        expect(page.locator("#look-status")).to_contain_text(
            "This is 1.1 MB, and the server takes at most 300 KB at once."
        )
        page.locator("#look-text").fill("a word or two " * 15_000)
        page.get_by_role("button", name="Trace").click()
        expect(page.locator("#look-status")).to_contain_text("this server traces at most 1024")
        fits(page)


@both_widths
def test_long_words_right_to_left_and_emoji(browser, server, size):
    text = "W" * 400 + " مرحبا بالعالم 👩‍👩‍👧‍👦 שלום " + "ก" * 200 + "\n\n" + "x\u202e" + "四大发明" * 40
    with opened(browser, server.url, size=size) as page:
        page.locator("#look-text").fill("«مرحبا» hello")
        assert page.locator("#look-text").evaluate("area => getComputedStyle(area).direction") == "rtl"
        page.locator("#look-text").fill(text)
        assert page.locator("#look-text").evaluate("area => getComputedStyle(area).direction") == "ltr"
        page.get_by_role("button", name="Trace").click()
        page.wait_for_selector("#look-tokens .tok")
        page.locator("#look-tokens .tok").nth(60).click()
        fits(page)
        page.keyboard.press("Escape")
        page.locator("#tab-teach").click()
        page.locator("#teach-name").fill("N" * 180)
        page.locator("#teach-text").fill(text)
        page.get_by_role("button", name="Add to memory").click()
        expect(page.locator("#teach-documents")).to_contain_text("NNNN")
        fits(page)


def test_a_server_that_goes_and_comes_back(browser, server):
    with opened(browser, server.url, allowed="Failed to load|ERR_") as page:
        server.stop()
        page.get_by_role("button", name="Trace").click()
        expect(page.locator("#look-status")).to_contain_text("The server does not answer.")
        expect(page.locator("#banner")).to_contain_text("this page waits for it")
        server.start()
        expect(page.locator("#banner")).to_contain_text("The server answers again.")
        page.get_by_role("button", name="Trace").click()
        expect(page.locator("#look-status")).to_contain_text("tokens in")


def test_waiting_in_the_line_is_told(browser, server):
    with opened(browser, server.url) as page:
        server.waiting, server.answer_s = 2, 2.5
        page.get_by_role("button", name="Trace").click()
        expect(page.locator("#look-status")).to_have_text("The model is at work; 2 waiting.")
        expect(page.locator("#look-status")).to_contain_text("tokens in", timeout=20_000)


def test_a_server_that_is_loading(browser, server):
    server.status = "loading"
    context = browser.new_context(locale="en-GB")
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#banner")).to_have_text("The model is being loaded.")
    server.status = "ready"
    page.wait_for_selector("body[data-ready]")
    expect(page.locator("#banner")).to_be_hidden()
    context.close()


def test_a_model_without_memory(browser):
    with PageServer(memory=False) as server, opened(browser, server.url) as page:
        page.get_by_role("button", name="Trace").click()
        expect(page.locator("#look-note")).to_contain_text("neither learned tables nor an index")
        page.locator("#look-tokens .tok").nth(3).click()
        expect(page.locator("#look-card")).to_contain_text("No learned tables are attached.")
        page.locator("#tab-teach").click()
        expect(page.locator("#teach-status")).to_contain_text("This server holds no index.")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator("#teach-answers .answer")).to_have_count(1)
        page.locator("#tab-think").click()
        page.get_by_role("button", name="Next token").click()
        expect(page.locator("#think-lists table")).to_have_count(3)


# ---- languages, themes, accessibility


def test_language_and_theme_are_remembered(browser, server):
    with opened(browser, server.url) as page:
        assert page.locator("html").get_attribute("lang") == "en"
        page.get_by_role("button", name="Trace").click()
        page.wait_for_selector("#look-tokens .tok")
        page.get_by_role("button", name="中文").click()
        assert page.locator("html").get_attribute("lang") == "zh-Hans"
        expect(page.locator("#look h2")).to_have_text("记忆在哪里说话")
        expect(page.locator("#look-plots")).to_contain_text("斯皮尔曼")
        page.locator("#theme").click()
        assert page.locator("html").get_attribute("data-theme") == "dark"
        page.reload()
        page.wait_for_selector("body[data-ready]")
        expect(page.locator("#look h2")).to_have_text("记忆在哪里说话")
        assert page.locator("html").get_attribute("data-theme") == "dark"


def test_the_browsers_own_wishes_come_first(browser, server):
    with opened(browser, server.url, locale="zh-CN", color_scheme="dark") as page:
        assert page.locator("html").get_attribute("lang") == "zh-Hans"
        assert page.locator("#theme").get_attribute("aria-pressed") == "true"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 19, 17)"


def fill_look(page) -> None:
    page.get_by_role("button", name="Trace").click()
    page.locator("#look-numbers summary").click()
    page.locator("#look-tokens .tok").nth(6).click()
    page.wait_for_selector("#look-card mark")


def fill_think(page) -> None:
    page.get_by_role("button", name="Next token").click()
    page.wait_for_selector(".chances")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("#think-tokens .tok")


def fill_teach(page) -> None:
    page.get_by_role("button", name="Add an example and see").click()
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector('[data-arm="memory"] .tok')


def fill_quiz(page) -> None:
    page.get_by_role("button", name="I do not know").click()
    page.wait_for_selector("#quiz-answers table")


@pytest.mark.parametrize(("size", "theme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def test_accessible_by_axe_rules(browser, server, size, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is in the dev extra").Axe()
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}
    with opened(browser, server.url, size=size, color_scheme=theme) as page:
        for name, fill in {
            "look": fill_look,
            "think": fill_think,
            "teach": fill_teach,
            "quiz": fill_quiz,
        }.items():
            page.locator(f"#tab-{name}").click()
            fill(page)
            found = axe.run(page, options=rules)
            assert found.violations_count == 0, (name, found.generate_report())
            fits(page)


# ---- the real server


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Iterator[str]:
    """The address of `engram-lm serve` with a tiny model, as a user starts it. It may still be loading."""
    from serve_support import make_index

    directory = tiny_model(tmp_path_factory)
    question = {
        "id": "dog",
        "kind": "verbatim",
        "prompt": "The office dog is called",
        "document": "dogs.md",
        "answer": ["Orlando"],
    }
    (directory / "quiz.json").write_text(json.dumps([question]))
    index, quiz = make_index(directory / "index"), directory / "quiz.json"
    with serving(directory / "model", "--index", index, "--lam", "0.9", "--quiz", quiz) as address:
        yield address


def tiny_model(tmp_path_factory) -> Path:
    pytest.importorskip("torch")
    pytest.importorskip("fastapi")
    from models import build
    from serve_support import words

    directory = tmp_path_factory.mktemp("real")
    build("llama").save_pretrained(directory / "model")
    words().save_pretrained(directory / "model")
    return directory


@contextmanager
def serving(*options) -> Iterator[str]:
    command = [sys.executable, "-m", "engram_lm.cli", "serve", *map(str, options), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = next(
            found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+/", line))
        )
        yield address
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def test_a_visitor_logs_in_with_the_key(browser, tmp_path_factory):
    key = "a key of twenty-two signs"
    with serving(tiny_model(tmp_path_factory) / "model", "--key", key) as address:
        page = browser.new_page()
        page.goto(address)
        page.locator("input[name=key]").fill("another")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("not the key")
        page.locator("input[name=key]").fill(key)
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]", timeout=120_000)
        page.close()


@both_widths
def test_every_panel_against_the_real_server(browser, real, size):
    idle = {"timeout": 120_000, "state": "attached"}
    with opened(browser, real, size=size, hash_="#/look", allowed="422") as page:
        page.locator("#look-text").fill("The office dog is called Orlando.")
        page.get_by_role("button", name="Trace").click()
        page.wait_for_selector("#look-tokens .tok", timeout=120_000)
        assert page.locator("#look-tokens .strip").text_content() == "The office dog is called Orlando."
        page.locator("#look-tokens .tok").nth(25).click()
        expect(page.locator("#look-card mark").first).to_be_visible(timeout=60_000)
        expect(page.locator("#look-card")).to_contain_text("dogs.md")
        page.keyboard.press("Escape")

        page.locator("#tab-think").click()
        page.locator("#think-prompt").fill("The office dog is called")
        page.locator("#think-candidates").fill("Orlando\nMax")
        page.get_by_role("button", name="Next token").click()
        expect(page.locator("#think-lists caption").nth(2)).to_have_text("Mix, λ 0.90", timeout=60_000)
        expect(page.locator(".chances tbody tr")).to_have_count(2)
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector("#think-writer-status:not([data-kind=working])", **idle)
        expect(page.locator("#think-tokens")).to_contain_text("The office dog is called Orlando")

        page.locator("#tab-teach").click()
        page.locator("#teach-name").fill("cat.md")
        page.locator("#teach-text").fill("The cat of the house is called Quillon.")
        page.get_by_role("button", name="Add to memory").click()
        expect(page.locator("#teach-documents")).to_contain_text("cat.md", timeout=60_000)
        expect(page.locator("#teach-log")).to_contain_text(re.compile(r"indexed \d+ tokens"))
        page.locator("#teach-question").fill("The cat of the house is called")
        page.get_by_role("button", name="Ask", exact=True).click()
        page.wait_for_selector("#teach-ask-status:not([data-kind=working])", **idle)
        expect(page.locator("#teach-ask-status")).to_have_text("Delete a document and ask again.")
        expect(page.locator('[data-arm="memory"]')).to_contain_text("Quillon")
        # A tiny model: the passages do not fit, which is told there and stops nothing.
        expect(page.locator('[data-arm="retrieval"]')).to_contain_text("exceed the model's 128")
        page.get_by_role("button", name="Delete cat.md").click()
        expect(page.locator("#teach-documents")).not_to_contain_text("cat.md", timeout=60_000)
        page.get_by_role("button", name="Ask", exact=True).click()
        page.wait_for_selector("#teach-ask-status:not([data-kind=working])", **idle)
        expect(page.locator("#teach-ask-status")).to_have_text("Delete a document and ask again.")
        expect(page.locator('[data-arm="memory"]')).not_to_contain_text("Quillon")

        page.locator("#tab-quiz").click()
        page.locator("#quiz-answer").fill("Orlando, I think")
        page.keyboard.press("Enter")
        expect(page.locator("#quiz .status")).to_contain_text("Right: You", timeout=120_000)
        expect(page.locator("#quiz-answers tbody tr")).to_have_count(4)
        fits(page)
