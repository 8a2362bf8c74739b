"""Who may ask: names the server answers to, origins, the token of this start, and a key where others can reach it.

A page of another site can make a browser send requests here. It cannot read the page that holds the token, it cannot claim
our origin, and a name of its own that points to 127.0.0.1 (DNS rebinding) is none of ours: each of the three is checked.

    access = Access.of("127.0.0.1", key=None)
    access.check_names(host="127.0.0.1:7860", origin="http://127.0.0.1:7860")       # Refusal 403
"""

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from engram_lm.errors import ConfigError
from engram_lm.serve.http_errors import Refusal, shown

LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
SHORTEST_KEY = 16
COOKIE = "engram_session"
TOKEN_HEADER = "x-engram-token"


@dataclass(frozen=True, kw_only=True)
class Access:
    """names: hosts that requests may name, lower case, without port. token, session: drawn anew at every start."""

    names: frozenset[str] = LOCAL
    key: str | None = None
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    session: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @classmethod
    def of(cls, host: str, *, key: str | None = None, names: Iterable[str] = ()) -> "Access":
        """For a server that listens on `host`. ConfigError without a key where others can reach it."""
        if key is not None and (len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable()):
            raise ConfigError(
                f"A key is at least {SHORTEST_KEY} printable ASCII characters; got {len(key)} characters. "
                "Draw one: python -c 'import secrets; print(secrets.token_urlsafe())'"
            )
        host = host.strip("[]").lower()
        if key is None and not _is_local(host):
            raise ConfigError(
                f"--host {host} can be reached by others, and there is no key. Give --key, or stay on 127.0.0.1."
            )
        allowed = set(LOCAL) | {name.lower() for name in names}
        if not _is_any(host):
            allowed.add(host)
        elif not names:
            allowed |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        return cls(names=frozenset(allowed), key=key)

    def check_names(self, *, host: str | None, origin: str | None, site: str | None = None) -> None:
        """Refusal 403 for a Host, Origin or Sec-Fetch-Site that is not ours."""
        named = _hostname(host or "")
        if named not in self.names:
            raise Refusal(
                403,
                f"This server does not answer to the name {shown(host or '')}. Use one of "
                f"{', '.join(sorted(self.names))}, or start it with --name.",
            )
        if origin is not None:
            scheme, _, netloc = origin.lower().partition("://")
            if scheme not in ("http", "https") or netloc != (host or "").lower():
                raise Refusal(403, f"Requests from another site ({shown(origin)}) are not taken.")
        if site is not None and site not in ("same-origin", "none"):
            raise Refusal(403, "Requests that another site makes the browser send are not taken.")

    def check_token(self, given: str | None) -> None:
        """Refusal 403 without the token of this start."""
        if not same(given, self.token):
            raise Refusal(
                403,
                "The token is missing or of an earlier start. Reload the page; a script finds the token in it "
                "(header X-Engram-Token).",
            )

    def holds_key(self, authorization: str | None) -> bool:
        """Whether `Authorization: Bearer KEY` stands in a request."""
        scheme, _, given = (authorization or "").partition(" ")
        return self.key is not None and scheme.lower() == "bearer" and same(given.strip(), self.key)

    def is_logged_in(self, cookies: str | None) -> bool:
        """Whether the cookie that `POST /login` gives is among a request's."""
        found = [part.strip().partition("=") for part in (cookies or "").split(";")]
        return any(name == COOKIE and same(value, self.session) for name, _, value in found)


def same(given: str | None, wanted: str) -> bool:
    """Equal, in a time that does not tell where they differ."""
    return given is not None and hmac.compare_digest(given.encode("utf8", "replace"), wanted.encode("utf8"))


def _hostname(host: str) -> str:
    """The name in a Host header, without port; "" for anything odd."""
    if not host.isascii() or any(sign in host for sign in "/@\\ ?#,"):
        return ""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # ValueError for what is none
        return (parts.hostname or "").lower()
    except ValueError:
        return ""


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == ""
