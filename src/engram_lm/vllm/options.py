"""What the server decides and what a request may ask for. No torch, no vLLM.

The server names index, gate and tenants, in vLLM's `additional_config` under "engram" or in the environment:

    index          ENGRAM_INDEX          directory of an index; without it there is no memory
    gate           ENGRAM_GATE           a gate's file, or the name of a shipped one ("smollm2")
    lambda         ENGRAM_LAMBDA         instead of a gate: one lambda everywhere, at least 0 and less than 1
    tenants        ENGRAM_TENANTS        whose documents every request sees, names with commas ("public")
    key_file       ENGRAM_KEY_FILE       instead of tenants: the key that signs tenant tokens; a request sees the documents of
                                         its token's tenant, and without a token it has no memory
    model          ENGRAM_MODEL          "check": other weights than the gate was fitted for are refused; "trust": taken
    most_verbatim  ENGRAM_MOST_VERBATIM  memory is silent after this many generated tokens in a row of a document's own

A request says more in `SamplingParams.extra_args` ("vllm_xargs" over HTTP, where values are plain):

    engram_lambda      instead of the server's gate or lambda; 0 switches memory off
    engram_documents   ids of documents; the others are not looked at
    engram_token       a signed tenant token (`engram_lm.tenancy`), where the server has a key

Never a tenant's name: whose documents a request sees is not for the request to say.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engram_lm.errors import ConfigError, TenantError
from engram_lm.tenancy import tenant_of

PREFIX = "engram"
MOST_DOCUMENTS = 64
_VARIABLES = {
    "index": "ENGRAM_INDEX", "gate": "ENGRAM_GATE", "lambda": "ENGRAM_LAMBDA", "tenants": "ENGRAM_TENANTS",
    "key_file": "ENGRAM_KEY_FILE", "model": "ENGRAM_MODEL", "most_verbatim": "ENGRAM_MOST_VERBATIM",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The server's. Exactly one of gate and lam, and of tenants and key_file."""

    index: str
    gate: str | None = None
    lam: float | None = None
    tenants: tuple[str, ...] | None = ("public",)
    key_file: str | None = None
    model: Literal["check", "trust"] = "check"
    most_verbatim: int | None = None

    def __post_init__(self) -> None:
        if (self.gate is None) == (self.lam is None):
            raise ConfigError(
                "A memory in vLLM has a gate or a fixed lambda, one of them: set ENGRAM_GATE (a gate's file, or smollm2) "
                "or ENGRAM_LAMBDA."
            )
        if self.lam is not None:
            require_lambda(self.lam, "lambda")
        if bool(self.tenants) == bool(self.key_file):
            raise ConfigError(
                "Requests see the documents of ENGRAM_TENANTS (public where it is unset), or those their tokens allow "
                "(ENGRAM_KEY_FILE): one of them."
            )
        if self.key_file:
            _key(self.key_file)
        if self.model not in ("check", "trust"):
            raise ConfigError(f"model is check or trust; got {self.model!r}.")
        if self.model == "trust" and self.gate is None:
            raise ConfigError("A fixed lambda fits every model: leave ENGRAM_MODEL unset, or name a gate.")
        most = self.most_verbatim
        if most is not None and (type(most) is not int or most < 1):
            raise ConfigError(f"most_verbatim is a whole number of tokens, at least 1; got {most!r}.")

    def tenants_for(self, options: RequestOptions) -> tuple[str, ...]:
        """Whose documents a request sees; none without a token where tokens are wanted. ConfigError for a token that
        is not good."""
        if not self.key_file:
            if options.token is not None:
                raise ConfigError(
                    "engram_token has no effect here: this server has no key for tenant tokens."
                )
            return self.tenants or ()
        if options.token is None:
            return ()
        try:
            return (tenant_of(options.token, _key(self.key_file)),)
        except TenantError as error:
            raise ConfigError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """A request's. None: as the server has it."""

    lam: float | None = None
    documents: tuple[str, ...] | None = None
    token: str | None = field(default=None, repr=False)


def settings_of(additional_config: Any, environ: Mapping[str, str] | None = None) -> Settings | None:
    """The server's settings; None where no memory is asked for. ConfigError where they cannot be.

    additional_config: vLLM's; read where it is a dict that has the key "engram". environ: default the process's.
    """
    environ = os.environ if environ is None else environ
    found = {key: environ[name] for key, name in _VARIABLES.items() if environ.get(name)}
    where = "the environment"
    if isinstance(additional_config, dict) and PREFIX in additional_config:
        if found:
            names = ", ".join(_VARIABLES[key] for key in found)
            raise ConfigError(f"Memory is set in additional_config and by {names}: leave one of them out.")
        found, where = additional_config[PREFIX], "additional_config"
        if not isinstance(found, dict):
            raise ConfigError(f'additional_config["engram"] is an object; got {type(found).__name__}.')
        if unknown := sorted(set(found) - set(_VARIABLES)):
            raise ConfigError(
                f'additional_config["engram"] has no key {unknown[0]!r}; it has {", ".join(_VARIABLES)}.'
            )
    if not found:
        return None
    if "index" not in found:
        raise ConfigError(
            f"{', '.join(found)} of a memory is set in {where}, but no index: set ENGRAM_INDEX too."
        )
    tenants = found.get("tenants", () if found.get("key_file") else ("public",))
    if isinstance(tenants, str):
        tenants = [name.strip() for name in tenants.split(",") if name.strip()]
    return Settings(
        index=str(found["index"]), gate=None if found.get("gate") is None else str(found["gate"]),
        lam=_number(found.get("lambda"), float, "ENGRAM_LAMBDA"), tenants=tuple(tenants), key_file=found.get("key_file"),
        model=found.get("model", "check"), most_verbatim=_number(found.get("most_verbatim"), int, "ENGRAM_MOST_VERBATIM"),
    )  # fmt: skip


def options_of(extra_args: Mapping[str, Any] | None) -> RequestOptions:
    """What a request asks for; ConfigError (a ValueError: HTTP 400) where it may not, or not so."""
    said = {key: value for key, value in (extra_args or {}).items() if str(key).startswith(PREFIX)}
    if not said:
        return _NOTHING
    lam, documents, token = (said.pop(f"engram_{name}", None) for name in ("lambda", "documents", "token"))
    if said:
        key = sorted(said)[0]
        if "tenant" in key:
            raise ConfigError(
                f"{key}: whose documents a request sees is the server's or a signed engram_token's to say."
            )
        raise ConfigError(
            f"There is no option {key!r}; a request may say engram_lambda and engram_documents."
        )
    if lam is not None:
        require_lambda(lam, "engram_lambda")
    if documents is not None:
        if (
            not isinstance(documents, list | tuple)
            or not 1 <= len(documents) <= MOST_DOCUMENTS
            or not all(isinstance(name, str) for name in documents)
        ):
            raise ConfigError(
                f"engram_documents is a list of 1 to {MOST_DOCUMENTS} document ids; got {str(documents)[:80]}."
            )
        documents = tuple(dict.fromkeys(documents))
        if lam == 0:
            raise ConfigError("engram_documents has no effect with an engram_lambda of 0: leave one out.")
    if token is not None and not isinstance(token, str):
        raise ConfigError("engram_token is a text, as engram-lm index token prints it.")
    return RequestOptions(lam=None if lam is None else float(lam), documents=documents, token=token)


_NOTHING = RequestOptions()


def require_lambda(value: Any, name: str) -> None:
    """ConfigError unless it is a number from 0 to below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"{name} is at least 0 and less than 1; got {value!r}.")


def _number(value: Any, kind: type, variable: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{variable} is a number; got {value!r}.") from None


@functools.cache
def _key(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: no key can be read here ({error}). Make one with engram-lm index key."
        ) from None
