"""bfloat16 rows that train: stochastic rounding against its twins, its mean, and tables that go on bit for bit."""

import copy

import numpy as np
import pytest
import torch

from engram_lm.errors import CheckpointError, ConfigError, RowUpdateError
from engram_lm.storage.codecs import bf16_values
from engram_lm.tables import (
    SGD,
    DeviceTable,
    RowAdam,
    RowAdamMomentum,
    RowMomentumSinkhorn,
    RowRMSprop,
    rounding,
)
from engram_lm.tables.kernels import round_bf16_stochastic, round_bf16_stochastic_plain, splitmix64

RULES = [SGD(), RowRMSprop(), RowAdam(), RowAdamMomentum(), RowMomentumSinkhorn()]
SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 3.4e38, -3.4e38, 1e-45, -1e-40, 1.17e-38, 1.0, -1.00390625],
    np.float32,
)


def values_of(seed: int, shape: tuple) -> np.ndarray:
    """float32 of every size and sign, special ones among them."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(shape) * 10.0 ** generator.uniform(-38, 38, shape)
    values = values.astype(np.float32).reshape(-1)
    values[: len(SPECIAL)] = SPECIAL[: len(values)]
    return values.reshape(shape)


def test_the_generator_is_splitmix64():
    """The first outputs from 1234567, as published with the algorithm's other implementations."""
    found = splitmix64(np.array([1234567], np.uint64), np.arange(5))
    assert found.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("width", [1, 3, 4, 5, 64])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 3), (2**63 - 1, 2**40)])
def test_the_kernel_is_its_plain_twins_bit_for_bit(width, seed, step):
    values = values_of(width, (40, width))
    row = np.random.default_rng(1).permutation(40) * 1_234_567_890_123
    found = round_bf16_stochastic(values, row, seed, step)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, round_bf16_stochastic_plain(values, row, seed, step))
    tensors = torch.from_numpy(values), torch.from_numpy(row)
    for function in (rounding.round_bf16_stochastic, rounding.round_bf16_stochastic_plain):
        as_torch = function(*tensors, seed=seed, step=step)
        np.testing.assert_array_equal(as_torch.view(torch.uint16).numpy(), found)


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    values, row = values_of(0, (n, 16)), np.arange(n)
    found = round_bf16_stochastic(values, row, 0, 0)
    assert found.shape == (n, 16)
    np.testing.assert_array_equal(found, round_bf16_stochastic_plain(values, row, 0, 0))


def test_a_row_gets_the_same_numbers_in_any_order_and_company():
    values, row = values_of(0, (50, 7)), np.arange(50) * 11
    whole = round_bf16_stochastic(values, row, 5, 9)
    order = np.random.default_rng(2).permutation(50)[:20]
    np.testing.assert_array_equal(round_bf16_stochastic(values[order], row[order], 5, 9), whole[order])
    np.testing.assert_array_equal(
        round_bf16_stochastic(np.ascontiguousarray(values[:, :3]), row, 5, 9), whole[:, :3]
    )


def test_seed_step_row_and_column_each_change_the_numbers():
    """Half-way values: each number goes up or down like a coin, so two draws of 4,000 agree in half the places."""
    values = np.full((1000, 4), 1.00390625, np.float32)  # half-way between two bfloat16
    row = np.arange(1000)
    first = round_bf16_stochastic(values, row, 0, 0)
    others = [
        round_bf16_stochastic(values, row, 1, 0),
        round_bf16_stochastic(values, row, 0, 1),
        round_bf16_stochastic(values, row + 1, 0, 0),
        np.roll(first, 1, axis=1),
        np.roll(first, 1, axis=0),
    ]
    for other in others:
        # 6 standard deviations of a fair coin thrown 4,000 times: 6 x 0.0079
        assert abs((first == other).mean() - 0.5) < 0.0475


def test_what_bfloat16_holds_does_not_change():
    every = bf16_values(np.arange(1 << 16).astype(np.uint16)).reshape(-1, 64)
    finite_or_infinite = ~np.isnan(every)
    found = round_bf16_stochastic(every, np.arange(len(every)), 0, 0)
    wanted = np.arange(1 << 16).astype(np.uint16).reshape(-1, 64)
    np.testing.assert_array_equal(found[finite_or_infinite], wanted[finite_or_infinite])
    assert np.isnan(bf16_values(found[~finite_or_infinite])).all()
    # a NaN whose upper 16 bits alone would be infinity
    low = np.array([[0x7F800001, 0xFF800001]], np.uint32).view(np.float32)
    assert np.isnan(bf16_values(round_bf16_stochastic(low, np.array([0]), 0, 0))).all()


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, 1e-3, -7e20, 1e-39])
def test_the_mean_is_the_number_itself(value):
    n, width = 2000, 64
    exact = np.float32(value)
    found = bf16_values(
        round_bf16_stochastic(np.full((n, width), exact, np.float32), np.arange(n), 0, 0)
    ).astype(np.float64)
    below, above = found.min(), found.max()
    assert below < exact < above
    assert len(np.unique(found)) == 2
    up = (float(exact) - below) / (above - below)
    # 6 standard deviations of the mean of 128,000 throws
    bound = 6 * (above - below) * (up * (1 - up) / (n * width)) ** 0.5
    assert abs(found.mean() - float(exact)) < bound


@pytest.mark.parametrize("rule", RULES)
def test_bf16_rows_take_the_rules_step_in_float32_and_are_rounded_back(rule):
    torch.manual_seed(0)
    table = DeviceTable(n_rows=30, width=6, dtype=torch.bfloat16, rule=rule, seed=3)
    table.rows_view().copy_(torch.randn(30, 6))
    mirror = DeviceTable(n_rows=30, width=6, rule=rule)
    for step in range(4):
        unique, gradient = torch.randperm(30)[:9].sort().values, torch.randn(9, 6)
        mirror.rows_view().copy_(table.rows_view())
        mirror.update(unique, gradient, rule=rule, learning_rate=0.01, scale=0.5)
        table.update(unique, gradient, rule=rule, learning_rate=0.01, scale=0.5)
        wanted = mirror.rows_view().to(torch.bfloat16)
        bits = round_bf16_stochastic_plain(mirror.rows_view()[unique].numpy(), unique.numpy(), 3, step)
        wanted[unique] = torch.from_numpy(bits).view(torch.bfloat16)
        assert torch.equal(table.rows_view(), wanted)
        for name, tensor in mirror.checkpoint().items():
            if name != "rows":
                assert torch.equal(table.checkpoint()[name], tensor)
    assert table.state_bytes() == 30 * rule.state_bytes_per_row(6)


def test_steps_under_half_the_last_bit_add_up():
    """400 steps of 1/16 of the last bit move 1.0 by 25 bits of 2^-7; rounded to nearest it would not move at all."""
    table = DeviceTable(n_rows=64, width=64, dtype=torch.bfloat16, rule=SGD())
    table.rows_view().fill_(1.0)
    step = 2.0**-11
    assert (torch.tensor(1.0) + step).to(torch.bfloat16) == 1.0
    every, gradient = torch.arange(64), torch.full((64, 64), -1.0)
    for _ in range(400):
        table.update(every, gradient, rule=SGD(), learning_rate=step)
    moved = table.rows_view().double().mean() - 1.0
    # each step adds a variance of at most 2^-7 x 2^-11; 4,096 numbers, 6 standard deviations: 0.0025
    assert abs(float(moved) - 400 * step) < 0.0025


@pytest.mark.parametrize("rule", RULES)
def test_bf16_training_goes_on_from_a_checkpoint_bit_for_bit(rule):
    torch.manual_seed(0)
    updates = [(torch.randperm(30)[:9].sort().values, torch.randn(9, 6)) for _ in range(6)]

    def train(table: DeviceTable, some: list) -> None:
        for unique, gradient in some:
            table.update(unique, gradient, rule=rule, learning_rate=0.01)

    whole = DeviceTable(n_rows=30, width=6, dtype=torch.bfloat16, rule=rule, seed=5)
    train(whole, updates[:3])
    held = {name: tensor.clone() for name, tensor in whole.checkpoint().items()}
    twin = copy.deepcopy(whole)
    again = DeviceTable(n_rows=30, width=6, dtype=torch.bfloat16, rule=rule)
    again.restore(held)
    other = DeviceTable(n_rows=30, width=6, dtype=torch.bfloat16, rule=rule)
    other.restore({name: tensor for name, tensor in held.items() if name != "state.rounding"})
    for table in (whole, twin, again, other):
        train(table, updates[3:])
    assert torch.equal(whole.rows_view(), twin.rows_view())
    assert torch.equal(whole.rows_view(), again.rows_view())
    assert not torch.equal(whole.rows_view(), other.rows_view())


def test_a_part_of_a_table_is_rounded_as_the_whole():
    torch.manual_seed(0)
    whole = DeviceTable(n_rows=20, width=5, dtype=torch.bfloat16, rule=SGD())
    part = DeviceTable(n_rows=8, width=5, dtype=torch.bfloat16, rule=SGD(), first_row=12)
    gradient = torch.randn(20, 5)
    whole.update(torch.arange(20), gradient, rule=SGD(), learning_rate=0.1)
    part.update(torch.arange(8), gradient[12:], rule=SGD(), learning_rate=0.1)
    assert part.rows_view().any()
    assert torch.equal(part.rows_view(), whole.rows_view()[12:])


def test_bf16_rows_train_through_their_handle():
    table = DeviceTable(n_rows=4, width=2, dtype=torch.bfloat16, rule=SGD())
    optimizer = torch.optim.SGD([table.gradients.handle], lr=0.5)
    rows = table.read(torch.tensor([[1, 1], [3, 0]]), table.gradients.handle)
    assert rows.dtype == torch.bfloat16
    rows.sum().backward()
    assert float(table.gradients.handle.grad) == pytest.approx((2 * (4 + 1 + 1)) ** 0.5)
    optimizer.step()
    assert table.rows_view().tolist() == [[-0.5, -0.5], [-1.0, -1.0], [0.0, 0.0], [-0.5, -0.5]]
    assert table.gradients.updates == 1


def test_float16_rows_do_not_train_and_states_of_other_rows_are_refused():
    table = DeviceTable(n_rows=4, width=2, dtype=torch.float16, name="facts")
    with pytest.raises(RowUpdateError, match=r"facts are torch\.float16, which do not train"):
        table.update(torch.tensor([0]), torch.ones(1, 2), rule=SGD(), learning_rate=0.1)
    table = DeviceTable(n_rows=4, width=2, name="facts")
    table.rows_view().fill_(1.0)
    with pytest.raises(CheckpointError, match=r"facts holds torch\.float32; .* state is of bfloat16 rows"):
        table.restore({"rows": torch.zeros(4, 2), "state.rounding": torch.tensor([0, 1])})
    assert (table.rows_view() == 1.0).all()
    with pytest.raises(ConfigError, match="seed is a whole number from 0"):
        DeviceTable(n_rows=4, width=2, seed=-1)
