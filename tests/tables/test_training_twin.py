"""Training with memory against the same model whose rows are an ordinary Parameter: every loop is exact, or refused by name.

The fast set runs a few ways of each kind and the slow one all, with the grid of optimizers, accumulation, clipping,
scalers and skipped steps. The verdicts are those that docs/training.md prints.
"""

from unittest import mock

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from dense_twin import EXACT, Trainee, judge  # noqa: E402
from engram_lm.tables import pending, stepping  # noqa: E402
from engram_lm.tables.gradients import RowGradients  # noqa: E402
from places import ROOT  # noqa: E402
from training_loops import OPTIMIZERS, Cell, grid, one  # noqa: E402
from training_ways import WAYS, grid_table, ways_tables  # noqa: E402

PAGE = ROOT / "docs" / "training.md"
FAST = (
    "accumulation and clipping: 3 backward a step, clipping active",
    "accumulation and clipping: largest number (order inf)",
    "accumulation and clipping: between two backward passes",
    "accumulation and clipping: in a pre-hook of the optimizer",
    "accumulation and clipping: clip_grad_value_",
    "gradients by hand: p.grad = p.grad / 3",
    "gradients by hand: a clone put aside and put back",
    "gradients by hand: another tensor put in its place",
    "gradients by hand: a scaled step by hand (p.data.add_)",
    "zeroing: optimizer.zero_grad() of a NaN",
    "zeroing: model.zero_grad(set_to_none=False) of a NaN",
    "zeroing: p.grad = zeros of a NaN",
    "zeroing: never, the gradient grows",
    "zeroing: in a post-hook of the optimizer",
    "skipped steps: NaN in the second of 3 backward passes",
    "skipped steps: for a NaN outside the rows",
    "skipped steps: not skipped: a step on NaN",
    "skipped steps: a backward that fails, and the next batch",
    "GradScaler: 2 backward a step, clipping active, skipped NaN at first",
    "GradScaler: a scale that grows and falls",
    "GradScaler: two optimizers, of which one skips",
    "several optimizers: in turn, one with the rows, each zeroed at its own turn",
    "several optimizers: on one gradient, each with all parameters",
    "several optimizers: none with the rows",
    "copies and checkpoints: deepcopy after a NaN that was zeroed",
    "copies and checkpoints: saved in the middle of an accumulation, loaded, gone on",
    "backward: gradients measured by torch.autograd.grad before it",
    "backward: in eval mode",
    "backward: a penalty on all parameters",
    "closures: LBFGS",
)


@pytest.mark.parametrize("name", FAST)
def test_a_way_of_training_is_exact_or_refused(name):
    verdict = judge(WAYS[name].run)
    assert verdict.says == WAYS[name].wanted, verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WAYS if name not in FAST])
def test_every_way_of_training_is_exact_or_refused(name):
    verdict = judge(WAYS[name].run)
    assert verdict.says == WAYS[name].wanted, verdict


def test_no_way_is_wrong():
    assert not [name for name, way in WAYS.items() if way.wanted.startswith("WRONG")]
    assert len({way.name for way in WAYS.values()}) > 100


@pytest.fixture(scope="module")
def grid_verdicts():
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_grid_is_exact(optimizer, grid_verdicts):
    found = {point: judge(point.run, rule=point.rule) for point in grid() if point.optimizer == optimizer}
    grid_verdicts |= {point: verdict.says for point, verdict in found.items()}
    assert not {point: verdict for point, verdict in found.items() if verdict.says != "exact"}


def test_the_page_prints_these_verdicts():
    page = PAGE.read_text(encoding="utf8")
    assert ways_tables({name: way.wanted for name, way in WAYS.items()}) in page
    # the slow tests hold every one of them to "exact"
    assert grid_table(dict.fromkeys(grid(), "exact")) in page


# ---- the judge itself ------------------------------------------------------------------------------------------------

CLIPPED = Cell(one(torch.optim.SGD), accumulate=2, clip=0.5)


def test_the_judge_lets_nothing_by_that_only_ends_alike():
    def once_more(trainee: Trainee) -> None:
        CLIPPED(trainee)
        if not trainee.is_dense:
            with torch.no_grad():
                trainee.rest()[0][0, 0] += 1e-3

    assert judge(CLIPPED).says == "exact"
    assert judge(once_more).says.startswith("WRONG: off by")
    assert judge(lambda trainee: trainee.told.append(float(trainee.is_dense))).says.startswith(
        "WRONG: it saw"
    )
    assert judge(lambda trainee: 1 / (1 - trainee.is_dense)).says.startswith("WRONG: None, the twin Zero")
    assert judge(lambda trainee: 1 / 0).says == "both raise ZeroDivisionError"


@pytest.mark.parametrize(
    ("broken", "way"),
    [
        # what clipping multiplied by never reaches the rows
        (mock.patch.object(pending.Rows, "last_factor", return_value=1.0), CLIPPED),
        # the second backward takes the place of the first
        (mock.patch.object(RowGradients, "_sum_of", lambda self, before, arrived: arrived), CLIPPED),
        # a step forgets that it hid the gradients
        (
            mock.patch.object(stepping.Step, "after"),
            WAYS["several optimizers: on one gradient, each with all parameters"].run,
        ),
        # rows go by another rate than their group's
        (mock.patch.object(stepping, "_rate", return_value=0.0501), CLIPPED),
    ],
)
def test_the_judge_sees_a_fault(broken, way):
    with broken:
        verdict = judge(way)
    assert verdict.says.startswith("WRONG"), verdict


def test_the_judge_sees_a_row_that_moved_by_a_little_more():
    """Ten times what is allowed, of how far the farthest row went."""

    def farther(trainee: Trainee) -> None:
        start = trainee.model.model.engram["a"][0].table.rows_view().clone()
        CLIPPED(trainee)
        if not trainee.is_dense:
            rows = trainee.model.model.engram["a"][0].table.rows_view()
            rows += 10 * EXACT * (rows - start)

    assert judge(farther).says.startswith("WRONG: off by")


def test_the_twin_holds_its_rows_as_parameters_and_no_handle_trains():
    def look(trainee: Trainee) -> None:
        assert all(isinstance(rows, nn.Parameter) for rows in trainee.rows())
        shapes = {rows.numel() > 1 for rows in trainee.rows()}
        assert shapes == {trainee.is_dense}
        assert len(trainee.rows()) + len(trainee.rest()) == len(trainee.parameters())

    assert judge(look).says == "exact"
