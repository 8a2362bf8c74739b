"""Identities: everything that changes an address or its meaning changes the hash, and a mismatch names both sides."""

import json
import pickle

import pytest

from engram_lm.addressing import PROFILES, Identity, resolve
from engram_lm.errors import IdentityError

PAPER = PROFILES["paper"].replace(rows_per_head=1000)
BASE = {
    "vocab_size": 500,
    "layers": (1, 4),
    "fill_id": 2,
    "token_map_hash": "aa",
    "tokenizer_fingerprint": "bb",
}


def identity(profile=PAPER, **changes):
    return resolve(profile, **{**BASE, **changes})[0].identity


def test_the_hash_is_pinned():
    """Stored in files for ever: a change here is a new identity_version."""
    assert identity().hash == "287451d9a45894d7ddd1d28493a7703f8f794757098519d024ef622990cac1c1"


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"profile": PAPER.replace(name="other")}, {"profile"}),
        ({"profile": PAPER.replace(version=2)}, {"profile_version"}),
        ({"profile": PAPER.replace(seed=1)}, {"multipliers"}),
        ({"profile": PAPER.replace(stop=("start", "dead"))}, {"stop"}),
        ({"profile": PAPER.replace(stop=("start", "eos")), "eos_ids": (3,)}, {"stop", "eos_ids"}),
        ({"profile": PAPER.replace(heads=4)}, {"heads", "moduli", "rows"}),
        ({"profile": PAPER.replace(orders=(2, 4))}, {"orders", "multipliers"}),
        ({"profile": PAPER.replace(moduli="odd")}, {"moduli_rule", "moduli", "rows"}),
        ({"layers": (2, 4)}, {"layer", "multipliers"}),
        ({"layers": (0, 1, 4)}, {"layer", "multipliers"}),
        ({"vocab_size": 501}, {"vocab_size", "multipliers"}),
        ({"fill_id": 3}, {"fill_id"}),
        ({"token_map_hash": "ab"}, {"token_map_hash"}),
        ({"tokenizer_fingerprint": None}, {"tokenizer_fingerprint"}),
        ({"rows_per_head": 1001}, set()),
    ],
)
def test_what_changes_the_hash(changes, keys):
    changed = identity(**changes)
    assert set(identity().differences(changed)) == keys
    assert (changed.hash == identity().hash) == (not keys)


def test_layer_facts_are_not_part_of_the_address():
    assert identity(PAPER.replace(head_width=7, conv_kernel=0, conv_dilation=1, gate="plain")) == identity()


def test_raw_profiles_carry_the_tokenizer_too():
    qwen = PROFILES["qwen-ple"].replace(rows_per_head=1000)
    one, two = (
        resolve(qwen, vocab_size=500, layers=(1,), eos_ids=(3,), tokenizer_fingerprint=fingerprint)[
            0
        ].identity
        for fingerprint in ("one", "two")
    )
    assert one != two


def test_json_round_trip_and_readability():
    written = identity()
    assert Identity.from_json(written.json) == written
    assert Identity.from_json(json.dumps(json.loads(written.json))).hash == written.hash
    assert hash(Identity.from_json(written.json.encode())) == hash(written)
    assert ' "layer": 1,' in written.json.splitlines()


def test_a_mismatch_names_both_hashes_and_each_value():
    stored, wanted = identity(), identity(layers=(2, 4), fill_id=3)
    stored.require_equal(identity(), where="rows.tbl")
    with pytest.raises(IdentityError) as caught:
        stored.require_equal(wanted, where="rows.tbl")
    text = str(caught.value)
    assert text.startswith("rows.tbl was made for address identity ")
    assert stored.hash in text
    assert wanted.hash in text
    assert "layer: 1 there, 2 here" in text
    assert "fill_id: 2 there, 3 here" in text
    assert json.dumps(wanted.facts["multipliers"]) in text
    assert "vocab_size" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "a JSON object; got list"), ('{"colour": 1}', "unknown keys 'colour'")],
)
def test_files_that_are_no_identity(text, message):
    with pytest.raises(IdentityError, match=message):
        Identity.from_json(text)


def test_facts_cannot_be_changed_afterwards():
    with pytest.raises(TypeError):
        identity().facts["layer"] = 9


def test_an_identity_travels_between_processes():
    assert pickle.loads(pickle.dumps(identity())) == identity()
