"""Tenant tokens: only the key's holder makes them, and nothing of one can be changed."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm import cli
from engram_lm.errors import ConfigError, TenantError
from engram_lm.tenancy import new_key, sign, tenant_of

KEY, OTHER = "11" * 32, "22" * 32


@settings(max_examples=60, deadline=None)
@given(
    tenant=st.text(min_size=1, max_size=40), place=st.integers(0, 10_000), letter=st.sampled_from("aZ0_-.=é")
)
def test_a_token_names_its_tenant_and_no_letter_of_it_can_change(tenant, place, letter):
    token = sign(tenant, KEY, seconds=10, now=1000.0)
    assert tenant_of(token, KEY, now=1009.0) == tenant
    at = place % len(token)
    if token[at] != letter:
        with pytest.raises(TenantError):
            tenant_of(token[:at] + letter + token[at + 1 :], KEY, now=1009.0)


def test_a_token_ends_and_is_of_one_key():
    token = sign("acme", KEY, seconds=10, now=1000.0)
    with pytest.raises(TenantError, match="is over"):
        tenant_of(token, KEY, now=1010.5)
    with pytest.raises(TenantError, match="not signed with this server's key"):
        tenant_of(token, OTHER, now=1001.0)


@pytest.mark.parametrize("token", ["", None, "acme", "engram1.", "engram1..", "a." * 4000, b"engram1.x.y"])
def test_what_is_no_token_is_refused(token):
    with pytest.raises(TenantError):
        tenant_of(token, KEY)


def test_a_client_cannot_write_its_own():
    facts = (
        base64.urlsafe_b64encode(json.dumps({"tenant": "acme", "until": 1e12}).encode()).rstrip(b"=").decode()
    )
    for seal in ("", "AAAA", sign("globex", KEY).rpartition(".")[2]):
        with pytest.raises(TenantError, match="not signed"):
            tenant_of(f"engram1.{facts}.{seal}", KEY)


@pytest.mark.parametrize("key", ["", "short", "11" * 31, None, "zz" * 32])
def test_a_weak_key_is_refused(key):
    with pytest.raises(ConfigError, match="at least 64 hexadecimal digits"):
        sign("acme", key)
    with pytest.raises(ConfigError, match="at least 64 hexadecimal digits"):
        tenant_of("x", key)


def test_the_commands_make_keys_and_tokens(tmp_path, capsys):
    assert cli.run(["index", "key"]) == 0
    key = capsys.readouterr().out.strip()
    assert len(key) == 64
    assert key != new_key()
    (tmp_path / "key").write_text(key + "\n")
    assert cli.run(["index", "token", "acme inc.", "--key-file", str(tmp_path / "key"), "--hours", "1"]) == 0
    assert tenant_of(capsys.readouterr().out.strip(), key) == "acme inc."
    assert cli.run(["index", "token", "acme", "--key-file", str(tmp_path / "absent")]) == cli.REFUSED
    assert "cannot be read" in capsys.readouterr().err
