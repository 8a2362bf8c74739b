"""Rows under any optimizer: bit-equal to a dense embedding under SGD, rules against plain twins, and what is refused."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from engram_lm.errors import AddressError, CheckpointError, ConfigError, RowUpdateError, StateError
from engram_lm.tables import (
    SGD,
    DeviceTable,
    RowAdam,
    RowAdamMomentum,
    RowMomentumSinkhorn,
    RowRMSprop,
    forget_pending,
    pending_rows,
    rule_from_json,
)
from engram_lm.tables.gradients import merge, merge_plain

ROWS, WIDTH = 50, 8


class Classifier(nn.Module):
    """Mean of looked-up rows, then a linear layer; the rows dense (nn.Embedding) or in a table."""

    def __init__(self, start: torch.Tensor, *, dense: bool, rule=None):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(WIDTH, 5)
        if dense:
            self.embedding = nn.Embedding.from_pretrained(start.clone(), freeze=False)
        else:
            self.table = DeviceTable(n_rows=ROWS, width=WIDTH, rule=rule or SGD())
            self.table.rows_view().copy_(start)
            # in a submodule after `linear`, where the dense model has its embedding: clipping sums norms in that order
            self.held = nn.ParameterDict({"handle": self.table.gradients.handle})
        self.dense = dense

    @property
    def handle(self):
        return self.held["handle"]

    def rows(self) -> torch.Tensor:
        return self.embedding.weight.data if self.dense else self.table.rows_view()

    def forward(self, input_ids, labels=None):
        if self.dense:
            looked_up = self.embedding(input_ids)
        else:
            self.table.gradients.check(self.handle, training=torch.is_grad_enabled())
            looked_up = self.table.read(input_ids, self.handle)
        logits = self.linear(looked_up.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def examples(seed: int, n: int = 64) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        # every row is touched in each step: then both norms run over the same numbers in the same order
        ids = torch.cat(
            [torch.randperm(ROWS, generator=generator), torch.randint(0, ROWS, (6,), generator=generator)]
        )
        found.append({"input_ids": ids, "labels": torch.randint(0, 5, (), generator=generator)})
    return found


def allocate(shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def batch(items: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([x["input_ids"] for x in items]), torch.stack([x["labels"] for x in items])


def train_loop(model: nn.Module, data: list[dict], *, clip: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(len(data) // 8):
        optimizer.zero_grad()
        for half in (0, 4):
            ids, labels = batch(data[step * 8 + half : step * 8 + half + 4])
            (model(ids, labels)["loss"] / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_plain_loop_is_bit_equal_to_a_dense_embedding(seed, clip):
    """SGD, accumulation 2, joint clipping, schedule."""
    torch.manual_seed(seed)
    start = torch.randn(ROWS, WIDTH)
    dense, table = Classifier(start, dense=True), Classifier(start, dense=False)
    for model in (dense, table):
        train_loop(model, examples(seed), clip=clip)
    assert (dense.rows() - start).abs().max() > 1e-4
    assert torch.equal(table.rows(), dense.rows())
    assert torch.equal(table.linear.weight, dense.linear.weight)


@pytest.mark.parametrize("seed", range(3))
def test_trainer_is_bit_equal_to_a_dense_embedding(seed, tmp_path):
    torch.manual_seed(seed)
    start = torch.randn(ROWS, WIDTH)
    models = [Classifier(start, dense=True), Classifier(start, dense=False)]
    for model in models:
        options = TrainingArguments(
            output_dir=tmp_path,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=0.05,
            learning_rate=0.5,
            optim="sgd",
            lr_scheduler_type="linear",
            num_train_epochs=1,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        Trainer(model=model, args=options, train_dataset=examples(seed)).train()
    dense, table = models
    assert (dense.rows() - start).abs().max() > 1e-4
    assert torch.equal(table.rows(), dense.rows())
    assert torch.equal(table.linear.weight, dense.linear.weight)


RULES = [
    SGD(),
    RowRMSprop(),
    RowAdam(),
    RowAdam(rate=2.0, beta2=0.9, eps=1e-3),
    RowAdamMomentum(),
    RowAdamMomentum(beta1=0.5, beta2=0.9, eps=1e-3),
    RowMomentumSinkhorn(),
    RowMomentumSinkhorn(gamma=1.0, balancings=1, tau=0.5, momentum=0.3),
]


@pytest.mark.parametrize("rule", RULES)
def test_kernels_follow_their_plain_twins(rule):
    torch.manual_seed(0)
    start = torch.randn(40, 6)
    rows = [start.clone(), start.clone()]
    states = [rule.new_state(40, 6, allocate), rule.new_state(40, 6, allocate)]
    for step in range(6):
        unique = torch.randperm(40)[: 5 * step].sort().values  # no rows at first
        gradient = torch.randn(len(unique), 6) * 10.0 ** (step - 3)
        gradient[3:4] = 0.0
        rule.apply_fast(rows[0], states[0], unique, gradient, 0.1, 0.7)
        rule.apply_plain(rows[1], states[1], unique, gradient, 0.1, 0.7)
    assert (rows[0] - start).abs().max() > 1e-2
    torch.testing.assert_close(rows[0], rows[1], rtol=2e-6, atol=2e-6)
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_the_same_updates_give_the_same_bits(rule):
    finals = []
    for _ in range(2):
        torch.manual_seed(0)
        table = DeviceTable(n_rows=40, width=6, rule=rule)
        for _ in range(3):
            unique = torch.randperm(40)[:20].sort().values
            table.update(unique, torch.randn(20, 6), rule=rule, learning_rate=0.1)
        finals.append({name: tensor.clone() for name, tensor in table.checkpoint().items()})
    assert finals[0]["rows"].any()
    for name, tensor in finals[0].items():
        assert torch.equal(tensor, finals[1][name])


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_no_gradient_reaches_keep_their_numbers_and_state(rule):
    torch.manual_seed(0)
    table = DeviceTable(n_rows=9, width=4, rule=rule)
    table.update(torch.arange(9), torch.randn(9, 4), rule=rule, learning_rate=0.1)
    before = {name: tensor.clone() for name, tensor in table.checkpoint().items()}
    table.update(torch.tensor([2, 5]), torch.randn(2, 4), rule=rule, learning_rate=0.1)
    others = torch.tensor([0, 1, 3, 4, 6, 7, 8])
    assert not torch.equal(table.rows_view()[2], before["rows"][2])
    for name, tensor in table.checkpoint().items():
        assert torch.equal(tensor[others], before[name][others])


@pytest.mark.parametrize(
    ("rule", "beta1"), [(RowAdam(rate=1.0, beta2=0.99), 0.0), (RowAdamMomentum(rate=1.0, beta2=0.99), 0.9)]
)
def test_row_adam_is_adam_on_its_second_moment(rule, beta1):
    """One row of width 1 is one number: torch's Adam must agree."""
    parameter = nn.Parameter(torch.tensor([0.3]))
    adam = torch.optim.Adam([parameter], lr=0.05, betas=(beta1, 0.99), eps=1e-8)
    rows = torch.tensor([[0.3]])
    state = rule.new_state(1, 1, allocate)
    for gradient in (0.5, -2.0, 0.01, 3.0):
        parameter.grad = torch.tensor([gradient])
        adam.step()
        rule.apply(rows, state, torch.tensor([0]), torch.tensor([[gradient]]), learning_rate=0.05, scale=1.0)
    torch.testing.assert_close(rows[0], parameter.data, rtol=1e-5, atol=1e-6)


def test_row_adam_momentum_by_hand():
    """beta1 = beta2 = 0.5, two steps. Gradients (3, 4) and (0, 2) have mean squares 12.5 and 2."""
    rule, rows = RowAdamMomentum(rate=1.0, beta1=0.5, beta2=0.5), torch.zeros(3, 2)
    state = rule.new_state(3, 2, allocate)
    one = torch.tensor([1])
    rule.apply(rows, state, one, torch.tensor([[3.0, 4.0]]), learning_rate=0.1, scale=1.0)
    # m = (1.5, 2) and v = 6.25, corrected to (3, 4) and 12.5
    wanted = -0.1 * torch.tensor([3.0, 4.0]) / 12.5**0.5
    torch.testing.assert_close(rows[1], wanted)
    rule.apply(rows, state, one, torch.tensor([[0.0, 2.0]]), learning_rate=0.1, scale=1.0)
    # m = (0.75, 2) and v = 4.125, corrected by 1 - 0.25 to (1, 8/3) and 5.5
    wanted = wanted - 0.1 * torch.tensor([1.0, 8 / 3]) / 5.5**0.5
    torch.testing.assert_close(rows[1], wanted)
    assert state["count"].tolist() == [0, 2, 0]
    assert not rows[[0, 2]].any()


@pytest.mark.parametrize(
    ("balancings", "balanced"),
    [
        # rows divided by 5 and 2
        (1, [[0.6, 0.8], [0.0, 1.0]]),
        # then columns by 0.6 and sqrt(0.64 + 1), then rows: (1, 0.8 / 1.280625) has norm 1.179086
        (3, [[0.848115, 0.529813], [0.0, 1.0]]),
    ],
)
def test_momentum_and_sinkhorn_by_hand(balancings, balanced):
    rule = RowMomentumSinkhorn(gamma=0.5, balancings=balancings)
    rows, state = torch.zeros(4, 2), rule.new_state(4, 2, allocate)
    gradient = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    rule.apply(rows, state, torch.tensor([0, 2]), gradient, learning_rate=0.1, scale=1.0)
    torch.testing.assert_close(state["momentum"][[0, 2]], 0.05 * gradient)
    torch.testing.assert_close(
        rows[[0, 2]], -0.1 * 0.5 * 2**0.5 * torch.tensor(balanced), rtol=1e-5, atol=1e-7
    )
    assert not rows[[1, 3]].any()
    # alone, a row is its Nesterov momentum brought to norm 1: 0.95 (0.95 0.05 G + 0.05 H) + 0.05 H = 0.045125 G + 0.0975 H
    rows.zero_()
    rule = RowMomentumSinkhorn(gamma=0.5, balancings=1)
    rule.apply(rows, state, torch.tensor([2]), torch.tensor([[1.0, 0.0]]), learning_rate=0.1, scale=1.0)
    nesterov = torch.tensor([0.0975, 2 * 0.045125])
    torch.testing.assert_close(
        rows[2], -0.1 * 0.5 * 2**0.5 * nesterov / nesterov.norm(), rtol=1e-5, atol=1e-7
    )


def test_sinkhorn_moves_every_row_by_the_same_size_and_every_column_nearly_so():
    rule = RowMomentumSinkhorn(rate=1.0)
    rows, state = torch.zeros(64, 8), rule.new_state(64, 8, allocate)
    gradient = torch.randn(64, 8) * torch.logspace(-1, 1, 64)[:, None] * torch.logspace(-1, 1, 8)
    gradient[7] = 1e-6  # under a thousandth of the mean norm
    rule.apply(rows, state, torch.arange(64), gradient, learning_rate=0.1, scale=1.0)
    size = rows.square().mean(1).sqrt()
    assert size[7] == 0.0
    assert state["momentum"][7].all()
    size[7] = size[6]
    torch.testing.assert_close(size, torch.full((64,), 0.18 * 0.1), rtol=1e-5, atol=0)
    across = rows.norm(dim=0)
    # the gradient's own columns differ a hundredfold
    assert across.max() / across.min() < 1.01


def test_state_bytes_are_as_stated():
    wanted = {SGD(): 0, RowRMSprop(): 4, RowAdam(): 8, RowAdamMomentum(): 136, RowMomentumSinkhorn(): 128}
    for rule, n_bytes in wanted.items():
        table = DeviceTable(n_rows=100, width=32, rule=rule)
        table.update(torch.tensor([3]), torch.ones(1, 32), rule=rule, learning_rate=0.1)
        assert rule.state_bytes_per_row(32) == n_bytes
        assert table.state_bytes() == 100 * n_bytes


@pytest.mark.parametrize("rule", [RowAdamMomentum(), RowMomentumSinkhorn()])
def test_rules_with_momentum_train_through_any_optimizer_and_go_on_from_a_checkpoint(rule):
    torch.manual_seed(0)
    start, data = torch.randn(ROWS, WIDTH), examples(0)
    whole = Classifier(start, dense=False, rule=rule)
    train_loop(whole, data[:32], clip=1.0)
    held = {name: tensor.clone() for name, tensor in whole.table.checkpoint().items()}
    twin = Classifier(start, dense=False, rule=rule)
    twin.table.restore(held)
    twin.linear.load_state_dict(whole.linear.state_dict())
    for model in (whole, twin):
        train_loop(model, data[32:], clip=1.0)
    assert (whole.rows() - start).abs().min() > 1e-4
    assert torch.equal(whole.rows(), twin.rows())


def test_merge_sums_repeated_rows_in_order_and_is_its_plain_twin():
    torch.manual_seed(0)
    address, gradient = torch.randint(0, 9, (64,)), torch.randn(64, 5)
    unique, merged = merge(address, gradient)
    assert unique.tolist() == sorted(set(address.tolist()))
    for u, row in zip(unique.tolist(), merged, strict=True):
        total = torch.zeros(5)
        for place in (address == u).nonzero()[:, 0]:
            total = gradient[place] if not total.any() else total + gradient[place]
        assert torch.equal(row, total)
    plain_unique, plain = merge_plain(address, gradient)
    assert torch.equal(plain_unique, unique)
    torch.testing.assert_close(plain, merged, rtol=1e-6, atol=1e-6)


def test_updates_are_deterministic():
    finals = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Classifier(torch.randn(ROWS, WIDTH), dense=False, rule=RowAdam())
        train_loop(model, examples(0), clip=0.5)
        finals.append(model.rows().clone())
    assert torch.equal(*finals)


def test_the_rule_multiplies_the_groups_rate():
    torch.manual_seed(0)
    start = torch.randn(ROWS, WIDTH)
    moved = []
    for rate in (1.0, 5.0):
        model = Classifier(start, dense=False, rule=SGD(rate=rate))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(*batch(examples(0, 4)))["loss"].backward()
        optimizer.step()
        moved.append(model.rows() - start)
    torch.testing.assert_close(moved[1], 5 * moved[0], rtol=1e-4, atol=1e-6)


def test_weight_decay_never_touches_rows():
    start = torch.randn(ROWS, WIDTH)
    model = Classifier(start, dense=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.9)
    model(torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, dtype=torch.long))["loss"].backward()
    optimizer.step()
    assert torch.equal(model.rows()[1:], start[1:])
    assert not torch.equal(model.rows()[0], start[0])


def test_zero_grad_drops_what_is_pending():
    start = torch.randn(ROWS, WIDTH)
    model = Classifier(start, dense=False)
    for set_to_none in (True, False):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(*batch(examples(0, 4)))["loss"].backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step()
        assert torch.equal(model.rows(), start)
        assert pending_rows(model) == 0


def test_backward_after_clipping_adds_to_the_clipped_gradient():
    start, data = torch.randn(ROWS, WIDTH), examples(2)
    models = [Classifier(start, dense=True), Classifier(start, dense=False)]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(*batch(data[:4]))["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        model(*batch(data[4:8]))["loss"].backward()
        optimizer.step()
    torch.testing.assert_close(models[1].rows(), models[0].rows(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", ["cpu"])
def test_gradient_scaler_on_bfloat16_autocast_divides_the_rows_too(device):
    """A loss scaler multiplies every gradient and divides it again before the step; rows must not keep the factor."""
    start, data = torch.randn(ROWS, WIDTH), examples(3)
    finals = []
    for scaled in (False, True):
        model = Classifier(start, dense=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=scaled)
        scaler.scale(model(*batch(data[:4]))["loss"]).backward()
        scaler.step(optimizer)
        finals.append(model.rows().clone())
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-6, atol=1e-7)


def test_a_fused_optimizer_that_divides_by_the_loss_scale_itself_divides_the_rows_too():
    start, data = torch.randn(ROWS, WIDTH), examples(3)
    finals = []
    for scaled in (False, True):
        model = Classifier(start, dense=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        scaler.scale(model(*batch(data[:4]))["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        finals.append(model.rows().clone())
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-6, atol=1e-7)
    optimizer.zero_grad()
    (scaler.scale(model(*batch(data[:4]))["loss"]) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.rows(), finals[1])
    assert pending_rows(model) == 0


@pytest.mark.parametrize("way", ["closure", "closure by name", "maximize"])
def test_steps_with_a_closure_and_ascent_are_those_of_a_dense_embedding(way):
    start, data = torch.randn(ROWS, WIDTH), examples(4)
    models = [Classifier(start, dense=True), Classifier(start, dense=False)]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, maximize=way == "maximize")

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(*batch(data[:4]))["loss"]
            loss.backward()
            return loss

        for _ in range(2):
            if way == "closure":
                optimizer.step(closure)
            elif way == "closure by name":
                optimizer.step(closure=closure)
            else:
                closure()
                optimizer.step()
    assert torch.equal(models[1].rows(), models[0].rows())
    assert models[1].table.gradients.updates == 2
    models[1].table.gradients.check_updates()


def test_an_optimizer_that_calls_its_closure_many_times_is_refused():
    model = Classifier(torch.randn(ROWS, WIDTH), dense=False)
    with pytest.raises(RowUpdateError, match="LBFGS evaluates its closure many times"):
        torch.optim.LBFGS(model.parameters()).step(lambda: model(*batch(examples(0, 4)))["loss"])


def test_averaged_weights_without_their_rows_are_noticed():
    model = Classifier(torch.randn(ROWS, WIDTH), dense=False)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged(*batch(examples(0, 4)))
    train_loop(model, examples(0), clip=1.0)
    averaged.update_parameters(model)
    with pytest.raises(StateError, match="averaging weights does not change rows"):
        averaged(*batch(examples(0, 4)))


def test_gradients_an_optimizer_steps_past_raise_at_the_next_forward():
    model = Classifier(torch.randn(ROWS, WIDTH), dense=False)
    optimizer = torch.optim.SGD(model.linear.parameters(), lr=0.5)
    ids, labels = batch(examples(0, 4))
    model(ids, labels)["loss"].backward()
    optimizer.step()
    with pytest.raises(RowUpdateError, match=r"never applied: SGD stepped without its handle"):
        model(ids, labels)
    forget_pending(model)
    model(ids, labels)


def test_two_optimizers_may_step_one_after_the_other():
    model = Classifier(torch.randn(ROWS, WIDTH), dense=False)
    first, second = (
        torch.optim.SGD(model.linear.parameters(), lr=0.5),
        torch.optim.SGD([model.handle], lr=0.5),
    )
    ids, labels = batch(examples(0, 4))
    before = model.rows().clone()
    model(ids, labels)["loss"].backward()
    first.step()
    second.step()
    assert not torch.equal(model.rows(), before)
    model(ids, labels)


def test_gradients_from_autograd_grad_raise_at_the_next_forward():
    model = Classifier(torch.randn(ROWS, WIDTH), dense=False)
    ids, labels = batch(examples(0, 4))
    torch.autograd.grad(model(ids, labels)["loss"], [model.handle])
    with pytest.raises(RowUpdateError, match=r"torch\.autograd\.grad"):
        model(ids, labels)


@pytest.mark.parametrize("foreach", [True, False])
def test_clipping_single_values_is_refused(foreach):
    model = Classifier(torch.randn(ROWS, WIDTH), dense=False)
    model(*batch(examples(0, 4)))["loss"].backward()
    with pytest.raises(RowUpdateError, match="what it sees of a table is the norm"):
        nn.utils.clip_grad_value_(model.parameters(), 1e-3, foreach=foreach)


def test_a_table_beyond_memory_is_one_clear_error():
    with pytest.raises(
        ConfigError,
        match=r"No memory for table: 1,000,000,000,000,000 rows of 64 numbers are 238,418,579 GiB",
    ):
        DeviceTable(n_rows=10**15, width=64)


def test_a_replaced_handle_is_refused():
    model = Classifier(torch.randn(ROWS, WIDTH), dense=False)
    model.held["handle"] = nn.Parameter(torch.zeros(1))
    with pytest.raises(RowUpdateError, match="no longer the model's parameter"):
        model(*batch(examples(0, 4)))


def test_a_gradient_that_is_not_finite_is_refused_before_the_rows_change():
    start = torch.randn(ROWS, WIDTH)
    model = Classifier(start, dense=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    (model(*batch(examples(0, 4)))["loss"] * float("inf")).backward()
    with pytest.raises(RowUpdateError, match="not finite"):
        optimizer.step()
    assert torch.equal(model.rows(), start)


def test_weights_and_rows_of_different_steps_are_noticed():
    model = Classifier(torch.randn(ROWS, WIDTH), dense=False)
    train_loop(model, examples(0), clip=1.0)
    old = Classifier(torch.randn(ROWS, WIDTH), dense=False)
    old.load_state_dict(model.state_dict())
    with pytest.raises(StateError, match="saved after 8 row updates, but the rows of table carry 0"):
        old.table.gradients.check_updates()
    model.table.gradients.check_updates()


def test_a_deep_copy_trains_alone():
    model = Classifier(torch.randn(ROWS, WIDTH), dense=False)
    twin = copy.deepcopy(model)
    assert twin.handle is twin.table.gradients.handle
    before = model.rows().clone()
    train_loop(twin, examples(0), clip=1.0)
    assert torch.equal(model.rows(), before)
    assert not torch.equal(twin.rows(), before)
    train_loop(model, examples(0), clip=1.0)
    assert torch.equal(model.rows(), twin.rows())


def test_rows_are_not_in_the_model():
    model = Classifier(torch.randn(ROWS, WIDTH), dense=False)
    assert sorted(model.state_dict()) == ["held.handle", "linear.bias", "linear.weight"]
    before = model.rows().clone()
    model.to(torch.bfloat16)
    assert model.rows().dtype == torch.float32
    assert torch.equal(model.rows(), before)


def test_a_dropped_table_is_freed():
    import gc
    import weakref

    table = DeviceTable(n_rows=4, width=2)
    gone = weakref.ref(table)
    del table
    gc.collect()
    assert gone() is None


def test_checkpoint_and_restore_are_inverse():
    model = Classifier(torch.randn(ROWS, WIDTH), dense=False, rule=RowAdam())
    train_loop(model, examples(0), clip=1.0)
    held = {name: tensor.clone() for name, tensor in model.table.checkpoint().items()}
    twin = Classifier(torch.randn(ROWS, WIDTH), dense=False, rule=RowAdam())
    twin.table.restore(held)
    twin.linear.load_state_dict(model.linear.state_dict())
    for each in (model, twin):
        train_loop(each, examples(1), clip=1.0)
    assert torch.equal(model.rows(), twin.rows())


def test_restore_refuses_other_sizes_and_states():
    table = DeviceTable(n_rows=4, width=2, rule=RowAdam(), name="facts")
    with pytest.raises(
        CheckpointError, match=r"facts has 4 rows of 2 numbers; the checkpoint holds rows of shape \(5, 2\)"
    ):
        table.restore({"rows": torch.zeros(5, 2)})
    with pytest.raises(CheckpointError, match="row-adam"):
        table.restore({"rows": torch.zeros(4, 2), "state.other": torch.zeros(4)})


def test_an_address_outside_is_refused_before_anything_is_read():
    table = DeviceTable(n_rows=4, width=2)
    out = torch.full((3, 2), 7.0)
    for bad in (4, -1):
        with pytest.raises(AddressError, match=f"Address {bad} at place 1"):
            table.gather(torch.tensor([0, bad, 1]), out=out)
    assert torch.equal(out, torch.full((3, 2), 7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 100])
def test_gather_is_indexing(dtype, n):
    table = DeviceTable(n_rows=33, width=5, dtype=dtype)
    table.rows_view().copy_(torch.randn(33, 5))
    address = torch.randint(0, 33, (n, 2))
    assert torch.equal(table.gather(address), table.rows_view()[address])
    assert torch.equal(table.prefetch(address).rows(), table.gather(address))


def test_rules_from_json():
    assert rule_from_json(RowAdam(rate=3.0).to_json()) == RowAdam(rate=3.0)
    assert rule_from_json("sgd") == SGD()
    for rule in RULES:
        assert rule_from_json(rule.to_json()) == rule
    with pytest.raises(ConfigError, match="Unknown row rule 'adamw'"):
        rule_from_json("adamw")
    with pytest.raises(ConfigError, match="unexpected keyword argument 'beta1'"):
        rule_from_json({"name": "row-adam", "beta1": 0.9})
    with pytest.raises(ConfigError, match="rate is 0"):
        RowAdam(rate=0)
    with pytest.raises(ConfigError, match=r"beta2 is 1\.5"):
        RowAdam(beta2=1.5)
    with pytest.raises(ConfigError, match=r"momentum is 1\.0"):
        RowMomentumSinkhorn(momentum=1.0)
    with pytest.raises(ConfigError, match="balancings is 10; it must be odd"):
        RowMomentumSinkhorn(balancings=10)


def test_no_warning_from_an_optimizer_that_finds_no_gradient_on_the_handle():
    model = Classifier(torch.randn(ROWS, WIDTH), dense=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in (torch.optim.AdamW(model.parameters()), torch.optim.Adagrad(model.parameters())):
            model(*batch(examples(0, 4)))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert model.handle.grad is None
