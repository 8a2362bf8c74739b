"""Whose documents a request may read: a signed token, never a field that a client sets. Without a token, no memory.

    key = new_key()                                          # kept by whoever runs the server
    token = sign("acme inc.", key, seconds=3600)             # handed to acme's application
    tenant_of(token, key)                                    # "acme inc.", or TenantError

A token is "engram1." + base64url of JSON {"tenant", "until"} + "." + base64url of HMAC-SHA256 of everything before that dot
(RFC 2104), with a key of at least 32 bytes. It names one tenant and an end; it cannot be taken back before that, other
than by another key.
"""

import base64
import hashlib
import hmac
import json
import secrets
import time

from engram_lm.errors import ConfigError, TenantError

PREFIX = "engram1."
KEY_BYTES = 32
_MOST_CHARACTERS = 4096


def new_key() -> str:
    """A random key, 32 bytes as 64 hexadecimal digits."""
    return secrets.token_hex(KEY_BYTES)


def sign(tenant: str, key: str, *, seconds: float = 86_400.0, now: float | None = None) -> str:
    """A token for one tenant, good for `seconds` from now (Unix time)."""
    if not isinstance(tenant, str) or not tenant:
        raise ConfigError(f"A tenant is a name; got {tenant!r}.")
    if not seconds > 0:
        raise ConfigError(f"A token is good for more than 0 seconds; got {seconds}.")
    until = (time.time() if now is None else now) + seconds
    facts = json.dumps({"tenant": tenant, "until": round(until, 3)}, separators=(",", ":"))
    head = PREFIX + _spelled(facts.encode())
    return f"{head}.{_spelled(_seal(head, key))}"


def tenant_of(token: str, key: str, *, now: float | None = None) -> str:
    """The tenant that a token speaks for. TenantError where it is missing, altered, of another key, or over."""
    secret = _secret(key)
    if not isinstance(token, str) or not token:
        raise TenantError("This request has no tenant token, so it has no memory.")
    head, dot, seal = token.rpartition(".")
    # whether the seal fits is decided before anything of the token is read
    if (
        len(token) > _MOST_CHARACTERS
        or not token.isascii()
        or not dot
        or not head.startswith(PREFIX)
        or not hmac.compare_digest(seal, _spelled(hmac.digest(secret, head.encode(), hashlib.sha256)))
    ):
        raise TenantError("This tenant token was not signed with this server's key.")
    facts = json.loads(base64.urlsafe_b64decode(_padded(head.removeprefix(PREFIX))))
    if facts["until"] < (time.time() if now is None else now):
        raise TenantError("This tenant token is over; ask for a new one.")
    return facts["tenant"]


def _seal(head: str, key: str) -> bytes:
    return hmac.digest(_secret(key), head.encode(), hashlib.sha256)


def _secret(key: str) -> bytes:
    try:
        secret = bytes.fromhex(key)
    except (TypeError, ValueError):
        secret = b""
    if len(secret) < KEY_BYTES:
        raise ConfigError(
            f"A key is at least {2 * KEY_BYTES} hexadecimal digits; make one with engram-lm index key."
        )
    return secret


def _spelled(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _padded(text: str) -> str:
    return text + "=" * (-len(text) % 4)
