"""docs/architecture.md is of the code as it stands: its picture, the rooms that it lists, the functions that it names."""

import importlib
import re
import sys

import pytest

from places import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import draw_architecture

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf8")


def test_the_picture_is_drawn_from_the_code():
    told = "run python docs/draw_architecture.py"
    assert draw_architecture.PICTURE.read_text(encoding="utf8") == draw_architecture.draw(), told


def test_every_room_is_on_one_floor_and_in_the_table():
    placed = [name for layer in draw_architecture.floors() for name in layer]
    assert len(placed) == len(set(placed))
    table = PAGE[PAGE.index("## Rooms") :]
    for name in placed:
        assert re.search(rf"`(src/engram_lm/)?{name}(/|\.py)`", table) or name == "__main__", name
    for listed in re.findall(r"`src/engram_lm/(\w+)(?:/|\.py)`", table):
        assert listed in placed


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(engram_lm(?:\.\w+)+)`", PAGE))))
def test_every_function_that_the_page_names_is_there(name):
    pytest.importorskip("transformers")
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        assert callable(found)
        return
    pytest.fail(name)
