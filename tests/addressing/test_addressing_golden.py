"""Published constants and hash matrices, and the transformers implementation, against all three ways of addressing."""

import itertools
import json
import time

import numpy as np
import pytest
import torch

from engram_lm.addressing import PROFILES, SHIPPED, AddressScheme, Profile, plain, resolve
from engram_lm.addressing.device import DeviceAddresses
from engram_lm.addressing.primes import is_prime, primes_from
from places import GOLDEN

GOLDEN = json.loads((GOLDEN / "addresses.json").read_text())


def by_torch(scheme, ids, **marks):
    marks = {
        key: None if value is None else torch.as_tensor(np.asarray(value)) for key, value in marks.items()
    }
    return DeviceAddresses(scheme)(torch.as_tensor(np.asarray(ids, dtype=np.int64)), **marks).numpy()


WAYS = {"numba": AddressScheme.addresses, "plain": plain.addresses, "torch": by_torch}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def shipped(name, **changes):
    facts = SHIPPED[name]
    arguments = {
        "vocab_size": facts.vocab_size,
        "layers": facts.layers,
        "fill_id": facts.pad_id,
        "eos_ids": facts.eos_ids,
    }
    return resolve(PROFILES[name], **{**arguments, **changes})


@pytest.mark.parametrize(("name", "key"), [("paper", "paper_demo"), ("deepseek-v4.1", "deepseek_v41")])
def test_multipliers_and_primes_are_the_published_ones(name, key):
    golden = GOLDEN[key]
    for scheme in shipped(name):
        assert scheme.vocab_size == golden["V"]
        assert scheme.fill_id == golden["pad_comp"]
        assert scheme.multipliers.tolist() == golden["multipliers"][str(scheme.layer)]
        assert scheme.moduli.tolist() == np.concatenate(golden["primes"][str(scheme.layer)]).tolist()


def test_row_totals_of_deepseek():
    first, second = shipped("deepseek-v4.1")
    assert (first.rows, second.rows) == (384_006_168, 384_016_682)
    assert (first.padded_rows, second.padded_rows) == (384_006_168, 384_016_682)


@every_way
@pytest.mark.parametrize(
    ("name", "key", "layer", "matrix"),
    [
        ("paper", "paper_demo", 1, "hash_L1_bos0"),
        ("paper", "paper_demo", 15, "hash_L15_bos0"),
        ("deepseek-v4.1", "deepseek_v41", 1, "hash_L1_bos0"),
    ],
)
def test_hash_matrices(way, name, key, layer, matrix):
    (scheme,) = [scheme for scheme in shipped(name) if scheme.layer == layer]
    rows_TC = way(scheme, GOLDEN[key]["comp_ids"]) - scheme.offsets
    assert rows_TC.tolist() == GOLDEN[key][matrix]


@every_way
def test_dead_token(way):
    golden = GOLDEN["deepseek_v41"]["dead_example"]
    scheme = shipped("deepseek-v4.1")[0]
    assert (way(scheme, golden["ids"]) - scheme.offsets).tolist() == golden["hash_L1"]
    # The same with a mask over any id.
    masked = [7 if token == golden["dead"] else token for token in golden["ids"]]
    mask = [token != golden["dead"] for token in golden["ids"]]
    assert (way(scheme, masked, mask_BT=mask) - scheme.offsets).tolist() == golden["hash_L1"]


@every_way
def test_toy(way):
    golden = GOLDEN["toy_paper"]
    profile = PROFILES["paper"].replace(
        name="toy",
        orders=tuple(golden["orders"]),
        heads=golden["heads"],
        rows_per_head=golden["rows_per_head"],
    )
    scheme = resolve(profile, vocab_size=1000, layers=golden["layers"], fill_id=golden["pad"])[0]
    assert scheme.multipliers.tolist() == golden["multipliers_L1"]
    assert scheme.moduli.tolist() == np.concatenate(golden["primes_L1"]).tolist()
    assert (way(scheme, golden["ids"]) - scheme.offsets).tolist() == golden["hash_L1"]


def test_qwen_constants():
    golden = GOLDEN["qwen_ple"]
    (scheme,) = shipped("qwen-ple", eos_ids=(5,))
    assert scheme.vocab_size == golden["vocab_size"]
    assert scheme.profile.seed == golden["seed"]
    assert scheme.multipliers.tolist() == golden["multipliers_index0"]
    assert (scheme.moduli[0], scheme.moduli[-1]) == (golden["first_prime"], golden["last_prime"])
    assert (scheme.rows, scheme.padded_rows) == (golden["rows"], golden["padded_rows"])
    assert scheme.columns == golden["heads"]


def test_shipped_widths():
    widths = {name: profile.memory_width for name, profile in PROFILES.items()}
    assert widths == {"paper": 1280, "deepseek-v4.1": 6144, "qwen-ple": 2560, "longcat": 3072}


def test_primes_are_exact_and_quick():
    sieve = [n for n in range(2, 2000) if all(n % d for d in range(2, int(n**0.5) + 1))]
    assert [n for n in range(-3, 2000) if is_prime(n)] == sieve
    # Strong pseudoprimes to the first bases, and the largest prime in an int64.
    for composite in (3_215_031_751, 3_474_749_660_383, 341_550_071_728_321, 3_825_123_056_546_413_051):
        assert not is_prime(composite)
    assert is_prime(2**63 - 25)
    assert next(primes_from(14)) == 17
    started = time.perf_counter()
    shipped("deepseek-v4.1")
    assert time.perf_counter() - started < 0.2


def qwen(config, index):
    """transformers' module of one PLE layer; returns its address of ids by reading them out of the embedding."""
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding

    module = Qwen4ExpTextNGramEmbedding(config, config.ple_embed_dim, layer_idx=index, ple_layer_index=index)
    seen = []
    module.ngram_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))

    def addresses(history_BX, n_tokens):
        module(history_BX, None)
        return seen.pop()[:, -n_tokens:].numpy()

    return module, addresses


@pytest.mark.parametrize("seed", range(6))
def test_qwen_equals_transformers(seed):
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    rng = np.random.default_rng(seed)
    order, heads = int(rng.integers(2, 6)), int(rng.integers(1, 5))
    vocab_size, eos = int(rng.integers(20, 3000)), int(rng.integers(0, 20))
    config = Qwen4ExpTextConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 4,
        ple_layer_ids=[1, 3, 4],
        ple_embed_dim=(order - 1) * heads * 2,
        ngram_size=order,
        heads_per_ngram=heads,
        ngram_vocab_size_base=int(rng.integers(30, 9000)),
        make_ngram_vocab_size_divisible_by=64,
        eos_token_id=eos,
        seed=int(rng.integers(0, 10_000)),
    )
    profile = PROFILES["qwen-ple"].replace(
        orders=tuple(range(2, order + 1)),
        heads=heads,
        seed=config.seed,
        row_multiple=64,
        rows_per_head=config.ngram_vocab_size_base,
    )
    schemes = resolve(profile, vocab_size=vocab_size, layers=(0, 2, 3), eos_ids=(eos,))
    ids_BT = rng.integers(0, vocab_size, (3, 23))
    ids_BT[rng.random((3, 23)) < 0.2] = eos
    for index, scheme in enumerate(schemes):
        module, addresses = qwen(config, index)
        assert scheme.moduli.tolist() == module.head_vocab_sizes
        assert scheme.multipliers.tolist() == module.layer_multipliers.tolist()
        assert scheme.padded_rows == module.ngram_embedding.num_embeddings
        wanted = addresses(torch.as_tensor(ids_BT), 23)
        for way in WAYS.values():
            np.testing.assert_array_equal(way(scheme, ids_BT), wanted)
            # In chunks, each with the ids before it.
            cuts = [0, 1, 2, 9, 23]
            parts = [
                way(scheme, ids_BT[:, i:j], previous_BP=ids_BT[:, max(0, i - order + 1) : i])
                for i, j in itertools.pairwise(cuts)
            ]
            np.testing.assert_array_equal(np.concatenate(parts, axis=1), wanted)
        # A masked place is an EOS to transformers.
        mask_BT = rng.random((3, 23)) < 0.8
        wanted = addresses(torch.as_tensor(np.where(mask_BT, ids_BT, eos)), 23)
        np.testing.assert_array_equal(scheme.addresses(ids_BT, mask_BT=mask_BT), wanted)


def longcat_reading(tokens, *, vocab_size, order, modulus, eos):
    """One sub-table of LongCat in Python integers: walk back, stop at an EOS or an ignored token."""
    rows = []
    for t in range(len(tokens)):
        total = 0
        for d in range(order):
            if t - d < 0 or tokens[t - d] < 0 or (d > 0 and tokens[t - d] == eos):
                break
            total += tokens[t - d] * vocab_size**d
        rows.append(total % modulus)
    return rows


@every_way
def test_longcat_equals_a_plain_reading(way):
    (scheme,) = shipped("longcat")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 131_072, 60)
    ids[rng.random(60) < 0.15] = 2
    ids[rng.random(60) < 0.1] = -1
    ids[:4] = 131_071
    assert scheme.moduli.tolist() == [78 * 131_072 + 2 * c + 1 for c in range(12)]
    rows_TC = way(scheme, ids) - scheme.offsets
    for c, modulus in enumerate(scheme.moduli.tolist()):
        wanted = longcat_reading(ids.tolist(), vocab_size=131_072, order=2 + c // 4, modulus=modulus, eos=2)
        assert rows_TC[:, c].tolist() == wanted


def test_an_own_profile_round_trips():
    for profile in PROFILES.values():
        assert Profile.from_json(profile.json) == profile
