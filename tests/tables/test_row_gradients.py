"""The gradient of a handle and the rows it carries: what torch does to the one happens to the other, or is refused."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from engram_lm.errors import RowUpdateError
from engram_lm.storage import TableWriter
from engram_lm.tables import SGD, DeviceTable, LoggedTable, RowAdam, forget_pending, pending_rows
from engram_lm.tables.pending import RowsGradient, gradient_of, norm_of

UNIQUE, ROWS = torch.tensor([1, 4]), torch.tensor([[3.0, 0.0], [0.0, 4.0]])


def a_gradient(**options) -> RowsGradient:
    return gradient_of(UNIQUE, ROWS.clone(), name="facts", **options)


def rows_of(gradient) -> torch.Tensor:
    return gradient.rows.scaled()[1]


class Looked(nn.Module):
    """A table with rows of 2 numbers, one looked up and summed."""

    def __init__(self, rule=None):
        super().__init__()
        self.table = DeviceTable(n_rows=6, width=2, rule=rule or SGD(), name="facts")
        self.handle = self.table.gradients.handle
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, *addresses):
        self.table.gradients.check(self.handle, training=torch.is_grad_enabled())
        return (self.table.read(torch.tensor(addresses), self.handle) * self.weight).sum()


# ---- the number and its rows -----------------------------------------------------------------------------------------


def test_it_is_the_norm_and_carries_the_rows():
    gradient = a_gradient()
    assert float(gradient) == 5.0
    assert type(gradient + 0) is torch.Tensor
    assert torch.equal(rows_of(gradient), ROWS)


@pytest.mark.parametrize("factor", [0.3, torch.tensor(0.3), torch.tensor([0.3])])
def test_what_multiplies_it_multiplies_the_rows_with_the_same_rounding(factor):
    gradient = a_gradient()
    gradient.mul_(factor).div_(7)
    gradient *= factor
    assert torch.equal(rows_of(gradient), ROWS.clone().mul_(0.3).div_(7).mul_(0.3))
    assert torch.equal(rows_of(-gradient / 3), -rows_of(gradient) / 3)
    assert torch.equal(rows_of(2 * gradient), 2 * rows_of(gradient))
    # out of place: the first one stays what it is
    assert torch.equal(rows_of(gradient), ROWS.clone().mul_(0.3).div_(7).mul_(0.3))


@pytest.mark.parametrize("n_gradients", [1, 3])
def test_clipping_and_scalers_that_take_lists_reach_the_rows(n_gradients):
    gradients = [a_gradient() for _ in range(n_gradients)]
    torch._foreach_mul_(gradients, 0.5)
    torch._foreach_mul_(gradients, torch.tensor(0.5))
    torch._foreach_div_(gradients, [4.0] * n_gradients)
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, torch.zeros(()), torch.tensor(0.5))
    for gradient in gradients:
        assert torch.equal(rows_of(gradient), ROWS / 32)
        assert float(gradient) == 5 / 32


def test_views_are_the_gradient_and_clones_are_others():
    gradient = a_gradient()
    clone, deep = gradient.clone(), copy.deepcopy(gradient)
    for view in (gradient.data, gradient.detach(), gradient.view(1), gradient[:], gradient.squeeze()):
        view.mul_(0.5)
    assert torch.equal(rows_of(gradient), ROWS / 32)
    assert torch.equal(rows_of(clone), ROWS)
    assert torch.equal(rows_of(deep), ROWS)
    clone.copy_(gradient)
    assert torch.equal(rows_of(clone), ROWS / 32)
    deep.data = gradient.data
    assert torch.equal(rows_of(deep), ROWS / 32)


def test_a_cast_keeps_the_rows_and_the_number_may_round():
    gradient = gradient_of(UNIQUE, ROWS * 1.001, name="facts")
    assert torch.equal(rows_of(gradient.to(torch.bfloat16) / 2), ROWS * 1.001 / 2)


def test_a_file_holds_the_number_alone():
    found = pickle.loads(pickle.dumps(a_gradient()))
    assert type(found) is torch.Tensor
    assert float(found) == 5.0


@pytest.mark.parametrize(
    "zero",
    [
        lambda g: g.zero_(),
        lambda g: g.fill_(0),
        lambda g: g.copy_(torch.zeros(1)),
        lambda g: g.__setitem__(0, 0.0),
        lambda g: g.data.zero_(),
        lambda g: torch._foreach_zero_([g]),
        lambda g: setattr(g, "data", torch.zeros(1)),
    ],
)
def test_zeroing_drops_the_rows(zero):
    for factor in (1.0, float("nan")):
        gradient = a_gradient()
        gradient.mul_(factor)
        zero(gradient)
        assert float(gradient) == 0.0
        assert gradient.rows.merged_UW is None


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.add_(1.0),
        lambda g: g.sub_(torch.ones(1)),
        lambda g: g.fill_(2.0),
        lambda g: g.copy_(torch.ones(1)),
        lambda g: g.mul_(g),
        lambda g: g.sqrt_(),
        lambda g: g.lerp_(torch.zeros(1), 0.5),
        lambda g: g.__setitem__(0, 1.0),
        lambda g: g.div_(2, rounding_mode="floor"),
        lambda g: g.clamp_(max=1.0),
        lambda g: torch.clip(g, -1.0, 1.0),
        lambda g: torch._foreach_add_([g], 1.0),
        lambda g: torch.add(g, 2, out=g),
        lambda g: torch.where(g > 1, g, 0),
        lambda g: g.masked_fill(g > 1, 0),
        lambda g: g.__setitem__(g > 1, 0),
    ],
)
def test_anything_else_that_writes_is_refused_and_changes_nothing(change):
    gradient = a_gradient()
    with pytest.raises(RowUpdateError):
        change(gradient)
    assert float(gradient) == 5.0
    assert torch.equal(rows_of(gradient), ROWS)


def test_what_reads_it_reads_a_number():
    gradient = a_gradient()
    assert gradient.item() == 5.0
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.pow(2).sum()) == 25.0
    assert str(gradient.abs()) == "tensor([5.])"
    gradient.add_(0.0)
    gradient.nan_to_num_()
    assert torch.equal(rows_of(gradient), ROWS)


@pytest.mark.parametrize("order", [1, 1.5, 3, float("inf"), 2, 2.0])
def test_norms_of_every_order_are_the_rows(order):
    gradient = a_gradient().mul_(0.5)
    wanted = torch.linalg.vector_norm(ROWS * 0.5, order)
    assert torch.linalg.vector_norm(gradient, order) == wanted
    assert torch._foreach_norm([gradient, torch.ones(3)], order)[0] == wanted
    assert gradient.norm(order) == wanted


def test_norms_that_rows_elsewhere_have_part_in_are_refused():
    gradient = a_gradient(norm=torch.tensor(13.0), is_whole=False)
    assert gradient.norm() == 13.0
    with pytest.raises(RowUpdateError, match=r"norm of order 1 .* clip by the norm of order 2"):
        gradient.norm(1)


@pytest.mark.parametrize("size", [1e-30, 1e25, 3e38])
def test_the_norm_holds_where_squares_leave_float32(size):
    rows = torch.full((2, 2), size)
    assert float(norm_of(rows)) == pytest.approx(min(2 * size, torch.finfo(torch.float32).max), rel=1e-6)
    assert gradient_of(UNIQUE, rows, name="facts").rows.merged_UW is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_not_kept(bad):
    gradient = gradient_of(UNIQUE, ROWS * bad, name="facts")
    assert not torch.isfinite(gradient)
    assert gradient.rows.merged_UW is None


# ---- a table's -------------------------------------------------------------------------------------------------------


def test_a_gradient_that_another_backward_adds_to_stays_one_object():
    """As torch adds to `p.grad` in place, for whoever holds it."""
    model = Looked()
    model(1).backward()
    held = model.handle.grad
    model(1, 2).backward()
    assert model.handle.grad is held
    assert model.table.gradients._pending[0].tolist() == [1, 2]
    assert model.table.gradients._pending[1].tolist() == [[2.0, 2.0], [1.0, 1.0]]
    assert pending_rows(model) == 2


def test_a_gradient_may_move_to_another_model():
    first, second = Looked(), Looked()
    first(1, 2).backward()
    second.handle.grad = first.handle.grad.clone()
    torch.optim.SGD([second.handle], lr=0.5).step()
    assert second.table.rows_view().tolist() == [[0, 0], [-0.5, -0.5], [-0.5, -0.5], [0, 0], [0, 0], [0, 0]]
    assert not first.table.rows_view().any()


def test_a_gradient_that_is_not_the_rows_raises_at_the_next_backward_too():
    model = Looked()
    model.handle.grad = torch.ones(1)
    with pytest.raises(RowUpdateError, match=r"of facts was replaced by a tensor of 1 that carries no row"):
        model(1).backward()
    model.handle.grad = None
    model(1).backward()
    assert pending_rows(model) == 1


def test_no_table_is_updated_where_one_cannot_be():
    good, bad = Looked(), Looked()
    optimizer = torch.optim.SGD([good.handle, bad.handle], lr=0.5)
    good(1).backward()
    (bad(1) * float("nan")).backward()
    with pytest.raises(RowUpdateError, match="not finite"):
        optimizer.step()
    assert not good.table.rows_view().any()
    bad.handle.grad = None
    optimizer.step()
    assert good.table.rows_view().any()
    assert good.table.gradients.updates == 1


def test_a_step_that_raises_leaves_no_gradient_behind():
    """What was hidden from it was applied; to bring it back later could undo a zero_grad."""
    model = Looked()

    class Broken(torch.optim.SGD):
        def step(self):
            raise ValueError

    broken, sound = Broken([model.handle], lr=0.5), torch.optim.SGD([model.handle], lr=0.5)
    model(1).backward()
    with pytest.raises(ValueError):
        broken.step()
    assert model.table.rows_view()[1, 0] == -0.5
    sound.step()
    assert model.table.rows_view()[1, 0] == -0.5


def test_the_gradient_of_a_step_is_there_until_it_is_zeroed_or_its_optimizer_is_gone():
    model = Looked()
    optimizer = torch.optim.SGD([model.handle], lr=0.5)
    model(1).backward()
    optimizer.step()
    assert float(model.handle.grad) == pytest.approx(2**0.5)
    assert pending_rows(model) == 0
    model(1).backward()
    assert model.table.gradients._pending[1].tolist() == [[2.0, 2.0]]
    optimizer.step()
    del optimizer
    gc.collect()
    model(1).backward()
    assert model.table.gradients._pending[1].tolist() == [[1.0, 1.0]]


def test_optimizers_are_not_kept_alive():
    model = Looked()
    optimizer = torch.optim.SGD([model.handle], lr=0.5)
    model(1).backward()
    optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None


def test_a_step_counts_as_an_update_only_where_rows_were_updated(tmp_path):
    """The log of a table on disk counts so too: the two numbers stay one."""
    with TableWriter(tmp_path / "t.engram", n_rows=6, width=2, codec="fp32") as writer:
        writer.add_rows(torch.zeros(6, 2).numpy())
        writer.finish()
    table = LoggedTable.open(tmp_path / "t.engram", tmp_path / "t.rows", rule=RowAdam())
    handle = table.gradients.handle
    optimizer = torch.optim.SGD([handle], lr=0.5)
    for i in range(4):
        table.read(torch.tensor([1]), handle).sum().backward()
        if i % 2:
            optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        optimizer.zero_grad()
    assert table.gradients.updates == table.store.last_update == 2
    assert handle.item() == 2.0


def test_an_optimizer_without_a_rate_is_refused_by_name():
    from transformers import Adafactor

    model = Looked()
    optimizer = Adafactor(model.parameters(), lr=None)
    model(1).backward()
    with pytest.raises(
        RowUpdateError, match="Adafactor has no learning rate in the group of the handle of facts"
    ):
        optimizer.step()


def test_an_optimizer_that_has_not_stepped_yet_may_still_have_the_rows():
    """The alarm for lost gradients looks for one before it raises."""
    model = Looked()
    rest, rows = torch.optim.SGD([model.weight], lr=0.5), torch.optim.SGD([model.handle], lr=0.5)
    model(1).backward()
    rest.step()
    model(1).backward()
    rest.step()
    rows.step()
    assert model.table.rows_view()[1, 0] != 0
    rows.zero_grad()
    del rows
    gc.collect()
    model(1).backward()
    rest.step()
    with pytest.raises(RowUpdateError, match="never applied: SGD stepped without its handle"):
        model(1)
    forget_pending(model)
    model(1)


def test_a_failed_backward_leaves_nothing():
    model = Looked()
    hook = model.weight.register_hook(lambda gradient: 1 / 0)
    loss = model(1, 2)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    hook.remove()
    model(3).backward()
    assert model.table.gradients._pending[0].tolist() in ([3], [1, 2, 3])
    model.zero_grad()
    model(3).backward()
    assert model.table.gradients._pending[0].tolist() == [3]


def test_a_copy_has_no_gradient_as_torch_copies_a_parameter():
    model = Looked()
    model(1).backward()
    twin = copy.deepcopy(model)
    assert twin.handle.grad is None
    assert twin.weight.grad is None
    assert pending_rows(twin) == 0
    assert pending_rows(model) == 1


def test_a_copy_may_train_beside_its_original():
    model = Looked()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, twin)]
    for _ in range(2):
        for each in (model, twin):
            each(1).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(model.table.rows_view(), twin.table.rows_view())
    assert model.table.rows_view()[1, 0] < 0


def test_rows_of_float16_models_do_not_train_in_eval_mode_either():
    from models import build, give_memory

    model = give_memory(build("llama")).half().eval()
    ids = torch.arange(2, 12)[None]
    loss = model(ids, labels=ids, use_cache=False).loss
    with pytest.raises(RowUpdateError, match="do not train under float16 weights"):
        loss.backward()
