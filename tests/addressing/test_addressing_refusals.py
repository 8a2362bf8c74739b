"""What addressing refuses, and in which words: ids, profiles and schemes that cannot be."""

import pytest

from engram_lm.addressing import PROFILES, Profile, plain, resolve
from engram_lm.errors import ConfigError, TokenIdError

DEEPSEEK = PROFILES["deepseek-v4.1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"ids_BT": [[1, 2], [3, 99_092]]},
            r"Token id 99092 at sequence 1, position 1 .* vocabulary of 99092 ids",
        ),
        ({"ids_BT": [1, -2, -3]}, r"Token id -2 at sequence 0, position 1 .* wanted 0 to 99091, or -1"),
        ({"ids_BT": [1], "previous_BP": [5, 100_000]}, r"Previous token id 100000 at sequence 0, position 1"),
        ({"ids_BT": [1], "previous_BP": [1, 2, 3, 4]}, r"previous ids have shape \(4,\) .* at most 3 ids"),
        ({"ids_BT": [[1], [1]], "previous_BP": [[1, 2, 3]]}, r"previous ids have shape \(1, 3\)"),
        ({"ids_BT": [1.0]}, r"ids have dtype float64; wanted integers"),
        ({"ids_BT": [True]}, r"ids have dtype bool"),
        ({"ids_BT": [[[1]]]}, r"ids have shape \(1, 1, 1\)"),
        (
            {"ids_BT": [1, 2], "mask_BT": [True]},
            r"mask has shape \(1,\); wanted the shape of the ids, \(2,\)",
        ),
        ({"ids_BT": [1, 2], "mask_BT": [0.0, -1e9]}, r"mask has dtype float64"),
        ({"ids_BT": [1, 2], "starts_BT": [2, 0]}, r"starts has dtype int64 or values other than 0 and 1"),
    ],
)
def test_wrong_ids_are_refused_by_name(arguments, message):
    (scheme,) = resolve(DEEPSEEK, vocab_size=99_092, layers=(1,), fill_id=2)
    for way in (scheme.addresses, lambda **kw: plain.addresses(scheme, kw.pop("ids_BT"), **kw)):
        with pytest.raises(TokenIdError, match=message):
            way(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orders": (3, 2)}, "orders is"),
        ({"orders": ()}, "orders is"),
        ({"heads": 0}, "heads is 0; wanted an integer of at least 1"),
        ({"heads": True}, "heads is True"),
        ({"stop": ("dead",)}, "wanted 'start'"),
        ({"stop": ("start", "pad")}, "wanted 'start'"),
        ({"fill": "zero"}, "in a mix 0 is a token"),
        ({"multipliers": "polynomial", "fill": "zero", "seed": 3}, "a polynomial draws nothing"),
        ({"gate": "none"}, "gate is 'none' with fusion 'gate'"),
        ({"conv_dilation": 3}, "without a convolution"),
        ({"moduli": "primes"}, "wanted one of distinct-primes, odd"),
        ({"head": 3}, "has no field 'head'. Fields: name, version, orders"),
    ],
)
def test_profiles_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        DEEPSEEK.replace(**changes)


def test_profile_files():
    values = DEEPSEEK.to_dict()
    with pytest.raises(ConfigError, match="has no field 'colour'"):
        Profile.from_dict({**values, "colour": 1})
    with pytest.raises(ConfigError, match="lacks orders"):
        Profile.from_dict({key: value for key, value in values.items() if key != "orders"})
    with pytest.raises(ConfigError, match="not JSON"):
        Profile.from_json("{")
    assert DEEPSEEK.replace(stop=("dead", "start")) == DEEPSEEK


@pytest.mark.parametrize(
    ("profile", "arguments", "message"),
    [
        ("paper", {"fill_id": None}, "fills with the pad id, wanted 0 to 999"),
        ("paper", {"fill_id": 1000}, "fill_id is 1000"),
        ("paper", {"fill_id": 2, "eos_ids": (1,)}, "without effect"),
        ("paper", {"fill_id": 2, "layers": (3, 1)}, "ascending and distinct"),
        ("paper", {"fill_id": 2, "layers": ()}, "wanted 0-based blocks"),
        ("paper", {"fill_id": 2, "vocab_size": 0}, "vocab_size is 0"),
        ("paper", {"fill_id": 2, "rows_per_head": 2**62}, "do not fit 64-bit addresses"),
        ("qwen-ple", {}, "eos_ids is empty"),
        ("qwen-ple", {"eos_ids": (1000,)}, "ids in the vocabulary of 1000"),
        ("qwen-ple", {"eos_ids": (3,), "fill_id": 2}, "that is 3. Leave it out"),
        ("qwen-ple", {"eos_ids": (3,), "token_map_hash": "ab"}, "a token map has no effect"),
        ("longcat", {"eos_ids": (3,), "rows_per_head": 2**53}, "does not fit 64 bits"),
    ],
)
def test_schemes_that_cannot_be(profile, arguments, message):
    with pytest.raises(ConfigError, match=message):
        resolve(PROFILES[profile], **{"vocab_size": 1000, "layers": (1,), **arguments})
