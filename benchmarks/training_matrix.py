"""Draw the tables of docs/training.md from a run: every way of training, and the grid of optimizers, judged by a dense twin.

    python benchmarks/training_matrix.py        # two minutes on one core

The loops and the judge are those of tests/support, which the tests hold to these verdicts.
"""

import os
import re
import sys
from pathlib import Path

HOME = Path(__file__).parent.parent
sys.path.insert(0, str(HOME / "tests" / "support"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from dense_twin import judge
from training_loops import grid
from training_ways import WAYS, grid_table, ways_tables

PAGE = HOME / "docs" / "training.md"


def put_between_marks(page: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    return re.sub(f"(?s){begin}.*?{end}", lambda _: f"{begin}{table}{end}", page)


def main() -> None:
    torch.set_num_threads(1)
    found = {name: judge(way.run) for name, way in WAYS.items()}
    points = {point: judge(point.run, rule=point.rule) for point in grid()}
    page = PAGE.read_text(encoding="utf8")
    page = put_between_marks(page, "ways", ways_tables({name: v.says for name, v in found.items()}))
    page = put_between_marks(page, "grid", grid_table({point: v.says for point, v in points.items()}))
    PAGE.write_text(page, encoding="utf8")
    wrong = [v for v in [*found.values(), *points.values()] if v.says.startswith("WRONG")]
    largest = max(v.error for v in [*found.values(), *points.values()])
    print(
        f"{len(found)} ways and {len(points)} loops of the grid: {len(wrong)} wrong, largest difference {largest:.1e}"
    )


if __name__ == "__main__":
    main()
