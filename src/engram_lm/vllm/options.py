"""What the server decides and what a request may ask for. No torch, no vLLM.

The server names index, gate and tenants, in vLLM's `additional_config` under "engram" or in the environment:

    key       variable        what
    index     ENGRAM_INDEX    directory of an index; without it there is no memory
    gate      ENGRAM_GATE     a gate's file, or the name of a shipped one ("smollm2")
    lambda    ENGRAM_LAMBDA   one lambda everywhere, at least 0 and less than 1, instead of a gate
    tenants   ENGRAM_TENANTS  tenants whose documents are seen, by commas ("public")
    model     ENGRAM_MODEL    "check": a gate is refused for other weights than it was fitted for; "trust": any are taken

A request says more in `SamplingParams.extra_args` ("vllm_xargs" over HTTP, where values are plain):

    engram_lambda      instead of the server's gate or lambda; 0 switches memory off
    engram_documents   ids of documents; the others are not looked at

Never a tenant: whose documents a request sees is not for the request to say.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engram_lm.errors import ConfigError

PREFIX = "engram"
MOST_DOCUMENTS = 64
_VARIABLES = {
    "index": "ENGRAM_INDEX", "gate": "ENGRAM_GATE", "lambda": "ENGRAM_LAMBDA", "tenants": "ENGRAM_TENANTS",
    "model": "ENGRAM_MODEL",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The server's. Exactly one of gate and lam."""

    index: str
    gate: str | None = None
    lam: float | None = None
    tenants: tuple[str, ...] = ("public",)
    model: Literal["check", "trust"] = "check"

    def __post_init__(self) -> None:
        if (self.gate is None) == (self.lam is None):
            raise ConfigError(
                "A memory in vLLM has a gate or a fixed lambda, one of them: set ENGRAM_GATE (a gate's file, or smollm2) "
                "or ENGRAM_LAMBDA."
            )
        if self.lam is not None:
            require_lambda(self.lam, "lambda")
        if not self.tenants:
            raise ConfigError("At least one tenant is needed; leave ENGRAM_TENANTS unset for public.")
        if self.model not in ("check", "trust"):
            raise ConfigError(f"model is check or trust; got {self.model!r}.")
        if self.model == "trust" and self.gate is None:
            raise ConfigError("A fixed lambda fits every model: leave ENGRAM_MODEL unset, or name a gate.")


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """A request's. None: as the server has it."""

    lam: float | None = None
    documents: tuple[str, ...] | None = None


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
    tenants = found.get("tenants", "public")
    if isinstance(tenants, str):
        tenants = [name.strip() for name in tenants.split(",") if name.strip()]
    lam = found.get("lambda")
    if isinstance(lam, str):
        try:
            lam = float(lam)
        except ValueError:
            raise ConfigError(f"ENGRAM_LAMBDA is a number; got {lam!r}.") from None
    return Settings(
        index=str(found["index"]), gate=None if found.get("gate") is None else str(found["gate"]), lam=lam,
        tenants=tuple(tenants), model=found.get("model", "check"),
    )  # fmt: skip


def options_of(extra_args: Mapping[str, Any] | None) -> RequestOptions:
    """What a request asks for; ConfigError (a ValueError: HTTP 400) where it may not, or not so."""
    said = {key: value for key, value in (extra_args or {}).items() if str(key).startswith(PREFIX)}
    if not said:
        return _NOTHING
    lam, documents = said.pop("engram_lambda", None), said.pop("engram_documents", None)
    if said:
        key = sorted(said)[0]
        if "tenant" in key:
            raise ConfigError(
                f"{key}: whose documents a request sees is the server's to say (ENGRAM_TENANTS)."
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
    return RequestOptions(lam=None if lam is None else float(lam), documents=documents)


_NOTHING = RequestOptions()


def require_lambda(value: Any, name: str) -> None:
    """ConfigError unless it is a number from 0 to below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"{name} is at least 0 and less than 1; got {value!r}.")
