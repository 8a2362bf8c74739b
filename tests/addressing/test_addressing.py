"""One answer from three implementations, however ids are cut, masked or packed; the reciprocal; the command."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.addressing import PROFILES, hashing, plain, resolve
from engram_lm.addressing.command import addresses_command
from engram_lm.addressing.device import DeviceAddresses
from engram_lm.errors import ConfigError, TokenIdError

DEEPSEEK = PROFILES["deepseek-v4.1"]


def oracle(scheme, ids, starts, mask):
    """Addresses of one sequence in Python integers: walk back from every token, place by place."""
    profile, rows = scheme.profile, []
    known = [int(x) if m and x >= 0 else None for x, m in zip(ids, mask, strict=True)]
    token = [scheme.fill_id if x is None else x for x in known]
    for t in range(len(ids)):
        values, open_ = [token[t]], not (known[t] is None and "dead" in profile.stop)
        for d in range(1, scheme.max_order):
            s = t - d
            open_ = open_ and s >= 0 and not starts[s + 1] and token[s] not in scheme.eos_ids
            open_ = open_ and not (known[s] is None and "dead" in profile.stop)
            values.append(token[s] if open_ else scheme.fill_id)
        row = []
        for order in profile.orders:
            for _ in range(profile.heads):
                if scheme.is_polynomial:
                    number = sum(x * scheme.vocab_size**d for d, x in enumerate(values[:order]))
                else:
                    number = 0
                    for x, m in zip(values[:order], scheme.multipliers.tolist(), strict=False):
                        number ^= x * m
                row.append(number % int(scheme.moduli[len(row)]) + int(scheme.offsets[len(row)]))
        rows.append(row)
    return rows


@st.composite
def schemes(draw):
    rule = draw(st.sampled_from(["pcg64", "splitmix64", "polynomial"]))
    fill = "zero" if rule == "polynomial" else draw(st.sampled_from(["pad", "eos"]))
    stop = ["start", *draw(st.sets(st.sampled_from(["dead", "eos"])))]
    orders = draw(st.sets(st.integers(1, 5), min_size=1, max_size=3))
    profile = DEEPSEEK.replace(
        name="drawn",
        orders=tuple(sorted(orders)),
        heads=draw(st.integers(1, 11) | st.sampled_from([8, 16])),
        multipliers=rule,
        moduli=draw(st.sampled_from(["distinct-primes", "odd"])),
        seed=0 if rule == "polynomial" else draw(st.integers(0, 2**40)),
        rows_per_head=draw(st.sampled_from([2, 7, 100, 8191, 8192, 646_400, 2**31 - 1, 2**33])),
        stop=tuple(stop),
        fill=fill,
    )
    vocab_size = draw(st.sampled_from([1, 2, 5, 1000, 2**20]))
    needs_eos = "eos" in stop or fill == "eos"
    some_id = st.integers(0, min(vocab_size - 1, 4))
    eos_ids = tuple(draw(st.sets(some_id, min_size=1, max_size=2))) if needs_eos else ()
    fill_id = draw(some_id) if fill == "pad" else None
    return draw(
        st.sampled_from(
            resolve(profile, vocab_size=vocab_size, layers=(0, 3), fill_id=fill_id, eos_ids=eos_ids)
        )
    )


@settings(max_examples=60, deadline=None)
@given(scheme=schemes(), seed=st.integers(0, 2**32), data=st.data())
def test_three_ways_and_every_cut_give_the_walk_back(scheme, seed, data):
    rng = np.random.default_rng(seed)
    B, T = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([0, 1, 2, 5, 31, 32, 33, 70]))
    ids_BT = rng.integers(-1, min(scheme.vocab_size, 2 ** int(rng.integers(1, 21))), (B, T))
    starts_BT, mask_BT = rng.random((B, T)) < 0.1, rng.random((B, T)) < 0.9
    marks = {"starts_BT": starts_BT, "mask_BT": mask_BT}
    wanted = np.array(
        [oracle(scheme, *row) for row in zip(ids_BT, starts_BT, mask_BT, strict=True)], dtype=np.int64
    ).reshape(B, T, scheme.columns)

    found = scheme.addresses(ids_BT, **marks)
    assert found.dtype == np.int64
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(plain.addresses(scheme, ids_BT, **marks), wanted)
    device = DeviceAddresses(scheme)
    tensors = {key: torch.from_numpy(value) for key, value in marks.items()}
    np.testing.assert_array_equal(device(torch.from_numpy(ids_BT), **tensors).numpy(), wanted)
    if wanted.size:
        assert 0 <= found.min() <= found.max() < scheme.rows

    cut = data.draw(st.integers(0, T))
    first, second = (
        {key: value[:, part] for key, value in marks.items()} for part in (slice(cut), slice(cut, None))
    )
    carried = scheme.carry(ids_BT[:, :cut], **first)
    assert carried.shape == (B, scheme.max_order - 1)
    np.testing.assert_array_equal(
        scheme.addresses(ids_BT[:, cut:], previous_BP=carried, **second), wanted[:, cut:]
    )
    np.testing.assert_array_equal(
        plain.addresses(scheme, ids_BT[:, cut:], previous_BP=carried, **second), wanted[:, cut:]
    )
    tensors = {key: torch.from_numpy(value.copy()) for key, value in first.items()}
    np.testing.assert_array_equal(device.carry(torch.from_numpy(ids_BT[:, :cut]), **tensors).numpy(), carried)


def test_packing_and_padding_equal_the_documents_alone():
    (scheme,) = resolve(DEEPSEEK, vocab_size=99_092, layers=(1,), fill_id=2)
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 99_092, length) for length in (5, 1, 9)]
    alone = [scheme.addresses(document) for document in documents]
    starts = np.concatenate([np.arange(len(document)) == 0 for document in documents])
    packed = scheme.addresses(np.concatenate(documents), starts_BT=starts)
    np.testing.assert_array_equal(packed, np.concatenate(alone))
    # Without the starts the second document would see the first.
    assert (scheme.addresses(np.concatenate(documents))[5] != alone[1][0]).any()
    for profile in ("paper", "deepseek-v4.1"):
        (scheme,) = resolve(PROFILES[profile], vocab_size=99_092, layers=(1,), fill_id=2)
        for document in documents:
            padded = np.concatenate([np.full(4, 77), document])
            mask = np.arange(len(padded)) >= 4
            found = scheme.addresses(padded, mask_BT=mask)[4:]
            np.testing.assert_array_equal(found, scheme.addresses(document))


@pytest.mark.parametrize(
    "modulus", [1, 2, 3, 101, 8191, 8192, 8209, 646_403, 16_000_057, 2**31 - 1, 2**33, 2**53, 2**61 - 1]
)
def test_the_reciprocal_is_exact_at_its_edges(modulus):
    """Mixes beside multiples of the modulus and near 2^63, where a rounded quotient is most likely off by one."""
    top = 2**63 - 1
    multiples = [
        k * modulus for k in {0, 1, 2, top // modulus, top // modulus - 1, top // modulus // 2, 2**30, 2**31}
    ]
    mixes = {m + e for m in multiples for e in (-2, -1, 0, 1, 2)} | {
        2**k + e for k in range(64) for e in (-1, 0, 1)
    }
    rng = np.random.default_rng(modulus)
    random = rng.integers(0, top, 20_000) // modulus * modulus
    mixes = np.array(
        [*(m for m in mixes if 0 <= m <= top), *random, *(random - 1).clip(0), *(random + modulus // 2)]
    )
    mixes = mixes[mixes >= 0].astype(np.int64)
    n = len(mixes)
    moduli = np.full(n, modulus, dtype=np.int64)
    out, scratch = np.empty(n, dtype=np.int64), mixes.copy()
    if hashing.two_steps(moduli):
        hashing._shrink(scratch, n, moduli, 1.0 / moduli)
        assert scratch.max() < modulus * 2**31
    hashing._remainders(scratch, n, moduli, 1.0 / moduli, np.full(n, 5, dtype=np.int64), out)
    np.testing.assert_array_equal(out, mixes % modulus + 5)


def test_moduli_that_fit_no_remainder_are_refused():
    with pytest.raises(ValueError, match="fit neither remainder"):
        hashing.two_steps(np.array([100, 2**31]))


def test_shapes_dtypes_and_emptiness():
    (scheme,) = resolve(DEEPSEEK, vocab_size=99_092, layers=(1,), fill_id=2)
    ids = np.array([[7, 8, 9]])
    wanted = scheme.addresses(ids)
    assert wanted.shape == (1, 3, 24)
    assert scheme.addresses([]).shape == (0, 24)
    assert scheme.addresses(np.zeros((2, 0), dtype=np.int64)).shape == (2, 0, 24)
    assert scheme.addresses([7]).shape == (1, 24)
    np.testing.assert_array_equal(scheme.addresses([7, 8, 9]), wanted[0])
    np.testing.assert_array_equal(scheme.addresses([9], previous_BP=[7, 8]), wanted[0, 2:])
    np.testing.assert_array_equal(scheme.addresses([9], previous_BP=[-1, 7, 8]), wanted[0, 2:])
    for dtype in (np.int32, np.uint16, np.uint64):
        np.testing.assert_array_equal(scheme.addresses(ids.astype(dtype)), wanted)
    np.testing.assert_array_equal(scheme.addresses(np.asfortranarray(np.repeat(ids, 2, 0)))[1:], wanted)
    np.testing.assert_array_equal(scheme.addresses(torch.tensor(ids)), wanted)
    read_only = ids.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(scheme.addresses(read_only), wanted)
    np.testing.assert_array_equal(scheme.addresses(ids, mask_BT=[[1, 1, 1]]), wanted)


def test_output_given():
    (scheme,) = resolve(DEEPSEEK, vocab_size=99_092, layers=(1,), fill_id=2)
    out = np.zeros((2, 3, 24), dtype=np.int64)
    found = scheme.addresses([[7, 8, 9], [1, 2, 3]], out_BTC=out)
    assert np.shares_memory(found, out)
    np.testing.assert_array_equal(out, scheme.addresses([[7, 8, 9], [1, 2, 3]]))
    assert np.shares_memory(scheme.addresses([7, 8, 9], out_BTC=out[0]), out)
    for wrong in (out[:1], out.astype(np.int32), out[:, ::-1], out.reshape(3, 2, 24), [1]):
        with pytest.raises(
            ConfigError, match=r"out_BTC is .* wanted a writable contiguous int64 array of shape \(2, 3, 24"
        ):
            scheme.addresses([[7, 8, 9], [1, 2, 3]], out_BTC=wrong)


def test_unchecked_and_masked_ids():
    (scheme,) = resolve(DEEPSEEK, vocab_size=99_092, layers=(1,), fill_id=2)
    # The id under a false mask is not read, whatever it is.
    np.testing.assert_array_equal(
        scheme.addresses([5, -100, 7], mask_BT=[True, False, True]), scheme.addresses([5, -1, 7])
    )
    wild = np.array([5, 10**15, 2**62, -7, 99_092])
    found = scheme.addresses(wild, check="none")
    assert 0 <= found.min() <= found.max() < scheme.rows
    np.testing.assert_array_equal(found, DeviceAddresses(scheme)(torch.from_numpy(wild)).numpy())
    with pytest.raises(ConfigError, match="check is 'warn'"):
        scheme.addresses([1], check="warn")
    device = DeviceAddresses(scheme)
    device.check(torch.tensor([[0, -1, 99_091]]))
    with pytest.raises(TokenIdError, match="Token id 99092 at sequence 1, position 0"):
        device.check(torch.tensor([[0], [99_092]]))


def test_torch_traces_in_one_graph():
    (scheme,) = resolve(
        PROFILES["longcat"].replace(rows_per_head=1000), vocab_size=99, layers=(0,), eos_ids=(2,)
    )
    device = DeviceAddresses(scheme)

    def forward(ids_BT, previous_BP, starts_BT, mask_BT):
        return device(ids_BT, previous_BP=previous_BP, starts_BT=starts_BT, mask_BT=mask_BT)

    rng = np.random.default_rng(0)
    inputs = (
        rng.integers(-1, 99, (2, 9)),
        rng.integers(-1, 99, (2, 3)),
        rng.random((2, 9)) < 0.2,
        rng.random((2, 9)) < 0.8,
    )
    compiled = torch.compile(forward, fullgraph=True, backend="eager")
    found = compiled(*map(torch.from_numpy, inputs)).numpy()
    names = ("previous_BP", "starts_BT", "mask_BT")
    wanted = scheme.addresses(inputs[0], **dict(zip(names, inputs[1:], strict=True)))
    np.testing.assert_array_equal(found, wanted)


def test_command():
    ids = "0,5,17,99,1234,-1,42,43"
    (scheme, _) = resolve(DEEPSEEK, vocab_size=99_092, layers=(1, 14), fill_id=2)
    text = addresses_command(profile="deepseek-v4.1", layer=1, ids=ids, canonical=True, json=True)
    wanted = scheme.addresses([int(x) for x in ids.split(",")]) - scheme.offsets
    assert json.loads(text) == wanted.tolist()
    table = addresses_command(profile="deepseek-v4.1", layer=1, ids=ids, canonical=True).splitlines()
    assert table[0].split()[:2] == ["id", "2-gram/0"]
    assert table[6].split() == ["-1", *map(str, wanted[5])]
    assert len({len(line) for line in table}) == 1
    assert (
        len(json.loads(addresses_command(profile="qwen-ple", layer=1, ids=[1], eos_ids=(5,), json=True))[0])
        == 16
    )
    for arguments, message in (
        ({"profile": "deepseek"}, "no profile 'deepseek'. Shipped: paper, deepseek-v4.1"),
        ({"canonical": False}, "say so with --canonical"),
        ({"layer": 2}, "layers 1, 14 do"),
        ({"profile": "qwen-ple"}, "--canonical has no effect"),
    ):
        with pytest.raises(ConfigError, match=message):
            addresses_command(
                **{"profile": "deepseek-v4.1", "layer": 1, "ids": ids, "canonical": True, **arguments}
            )
    with pytest.raises(TokenIdError, match="wanted integers with commas"):
        addresses_command(profile="deepseek-v4.1", layer=1, ids="1;2", canonical=True)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    ).stdout.strip()


def test_import_needs_neither_torch_nor_numba():
    code = "import engram_lm.addressing.command, sys; print({'torch', 'numba'} & set(sys.modules))"
    assert run(code) == "set()"
