"""Pictures of the page for the README, taken from a running server by a real browser: docs/page.png and docs/page.gif.

The recording shows one loop of the panel Teach: a question before, the document added, the question again, the document
deleted, the question once more. Waits longer than a quarter of a second are cut to that; nothing else is changed.

    python benchmarks/draw_page.py                    # starts `engram-lm serve` with its demo
    python benchmarks/draw_page.py --url http://127.0.0.1:7860/

Needs the dev extra and a chromium (Debian: apt-get install chromium fonts-noto-cjk).
"""

import argparse
import contextlib
import io
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parents[1] / "docs"
LONGEST_MS = 240
DELETE = "button[aria-label='Delete observatory.md']"
MOST_BYTES = 400_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="of a server that runs; otherwise one is started")
    parser.add_argument("--out", type=Path, default=DOCS)
    asked = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no chromium here: apt-get install chromium fonts-noto-cjk")
    with contextlib.ExitStack() as stack:
        url = asked.url or stack.enter_context(served())
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        for draw, file in ((picture, asked.out / "page.png"), (recording, asked.out / "page.gif")):
            page = browser.new_page(
                viewport={"width": 1180, "height": 780},
                locale="en-GB",
                color_scheme="light",
                reduced_motion="reduce",
            )
            page.set_default_timeout(180_000)
            page.goto(url)
            page.wait_for_selector("body[data-ready]")
            draw(page, file)
            page.close()
            size = file.stat().st_size
            print(f"{file}: {size:,} bytes")
            if size > MOST_BYTES:
                sys.exit(f"{file} is to stay under {MOST_BYTES:,} bytes.")
        browser.close()


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of `engram-lm serve`, started for this and stopped again."""
    command = Path(sys.executable).with_name("engram-lm")
    process = subprocess.Popen([command, "serve", "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"http://[\w.:]+/", line):
                yield found[0]
                return
        sys.exit("engram-lm serve ended before it listened.")
    finally:
        process.terminate()
        process.wait()


def picture(page: Page, file: Path) -> None:
    """The panel Look: a page of the handbook, one token open."""
    page.get_by_role("button", name="A page of the handbook").click()
    page.wait_for_selector("#look-tokens .tok")
    page.locator("#look-tokens .tok", has_text="Ferr").first.click()
    page.wait_for_selector("#look-card mark")
    height = page.evaluate(
        "document.querySelector('#look-result').getBoundingClientRect().bottom + scrollY + 24"
    )
    page.set_viewport_size({"width": 1180, "height": round(height)})
    page.evaluate("scrollTo(0, 0)")
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shot.quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


class Recorder:
    """Screenshots with the time each was seen for."""

    def __init__(self, page: Page, width: int) -> None:
        self.page, self.width = page, width
        self.frames: list[Image.Image] = []
        self.ms: list[float] = []
        self.last = time.perf_counter()

    def shoot(self, hold_ms: float | None = None) -> None:
        """One more frame; hold_ms: how long it stays, otherwise until the next."""
        now = time.perf_counter()
        if self.ms and self.ms[-1] == 0:
            self.ms[-1] = min(LONGEST_MS, 1000 * (now - self.last))
        self.last = now
        shot = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        self.frames.append(
            shot.resize((self.width, round(shot.height * self.width / shot.width)), Image.Resampling.LANCZOS)
        )
        self.ms.append(hold_ms or 0)

    def until(self, selector: str, hold_ms: float = 1200) -> None:
        """Frames of what changes until something is there: a few tokens more, or a line of the log."""
        before = None
        while self.page.locator(selector).count() == 0:
            seen = (
                self.page.locator("#teach-answers .tok").count() // 6,
                self.page.locator("#teach-log p").count(),
            )
            if seen != before:
                self.shoot()
            before = seen
            time.sleep(0.05)
        self.shoot(hold_ms)

    def save(self, file: Path) -> None:
        """A GIF in the page's own few colours; of each frame only what changed is stored."""
        palette = Image.new("P", (1, 1))
        palette.putpalette([round(band) for colour in _colours() for band in colour])
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.frames]
        frames[0].save(
            file, save_all=True, append_images=frames[1:], loop=0, optimize=True, disposal=1,
            duration=[max(60, round(ms / 10) * 10) for ms in self.ms],
        )  # fmt: skip


def _colours() -> list[tuple[float, ...]]:
    """Ink on paper in steps, heat in steps, and the two reds."""
    paper, white, ink, heat, memory = (
        (250, 249, 246),
        (255, 255, 255),
        (29, 28, 26),
        (221, 122, 116),
        (200, 40, 30),
    )
    steps = [(paper, ink, n / 15) for n in range(16)] + [(white, heat, n / 6) for n in range(7)]
    steps += [(heat, ink, 0.35), (heat, ink, 0.7), (memory, ink, 0)]
    return [
        tuple(a + (b - a) * part for a, b in zip(first, last, strict=True)) for first, last, part in steps
    ]


def recording(page: Page, file: Path) -> None:
    """Ask, add, ask, delete, ask."""
    recorder = Recorder(page, 820)
    ask = page.locator("#teach-ask button.primary")
    finished = "#teach-ask-status:not([data-kind=working]):not(:empty)"
    page.get_by_role("tab", name="Teach").click()
    page.wait_for_selector("#teach-documents tbody tr")
    if page.locator(DELETE).count():  # left over from a visitor
        page.locator(DELETE).click()
        page.locator(DELETE).wait_for(state="detached")
    page.evaluate(
        "scrollTo(0, document.querySelector('#teach-ask').getBoundingClientRect().top + scrollY - 150)"
    )
    page.get_by_label("Question, or the beginning of a sentence").fill(
        "Who runs the observatory on Mount Calder?"
    )
    page.locator("#teach-chat").check()
    recorder.shoot(1200)
    ask.click()
    recorder.until(finished)
    page.get_by_role("button", name="Add an example and see").click()
    recorder.until(DELETE)
    page.locator(DELETE).evaluate(
        "node => { node.closest('#teach-documents').scrollTop = node.offsetTop - 360 }"
    )
    ask.click()
    recorder.until(finished, 2500)
    page.locator(DELETE).click()
    page.locator(DELETE).wait_for(state="detached")
    recorder.shoot(1000)
    ask.click()
    recorder.until(finished, 2500)
    recorder.save(file)


if __name__ == "__main__":
    main()
