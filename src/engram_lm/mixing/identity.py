"""Which model and tokenizer a gate meets, and the token rules that follow from them. A model's print is taken once.

rules = rules_of(tokenizer, model, snapshot)
require_identity(gate, tokenizer=tokenizer, model=model)      # IdentityError
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Literal

from engram_lm.errors import ConfigError
from engram_lm.identity import fingerprint_of, print_of
from engram_lm.mixing.gate import Lambda
from engram_lm.mixing.mix import TokenRules, token_rules

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot

# model -> (versions of its parameters, fingerprint): a tenth of a second for a small model
_known: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def rules_of(
    tokenizer: Any, model: Any, snapshot: Snapshot, *, end: Literal["eos", "nothing"] = "eos"
) -> TokenRules:
    """Token rules of a transformers model and its tokenizer. end: whether the index's END speaks for end-of-text."""
    if tokenizer is None or model is None:
        raise ConfigError("Memory needs tokenizer and model, or rules=TokenRules(...).")
    if end not in ("eos", "nothing"):
        raise ConfigError(f"end is eos or nothing; got {end!r}.")
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    eos = eos[0] if isinstance(eos, list | tuple) else eos
    eos = getattr(tokenizer, "eos_token_id", None) if eos is None else eos
    head = model.get_output_embeddings()
    n_logits = model.config.get_text_config().vocab_size if head is None else head.weight.shape[0]
    return token_rules(
        tokenizer, n_logits=n_logits, n_tokens=snapshot.vocab_size, eos_id=eos if end == "eos" else None
    )


def require_identity(gate: Lambda, *, tokenizer: Any, model: Any) -> None:
    """IdentityError where the gate was fitted for another tokenizer or model; None leaves one unchecked."""
    gate.require(
        tokenizer=None if tokenizer is None else as_the_gate_says(gate, tokenizer),
        model=model_print(model) if model is not None and getattr(gate, "model", "") else None,
    )


def as_the_gate_says(gate: Lambda, tokenizer: Any) -> str | None:
    """What `Lambda.require` is to compare: the gate's own words where they name this tokenizer, however they were taken; the
    tokenizer's print where they do not; None where the gate names none."""
    stored = getattr(gate, "tokenizer", "")
    if not stored:
        return None
    found = print_of(tokenizer)
    return stored if found.is_the_one_of(stored) else found.text


def model_print(model: Any) -> str:
    """`identity.fingerprint_of`, remembered while no parameter is written to."""
    state = tuple((id(parameter), parameter._version) for parameter in model.parameters())
    try:
        before = _known.get(model)
    except TypeError:  # cannot be referred to weakly, or is not hashable
        return fingerprint_of(model)
    if before is None or before[0] != state:
        before = state, fingerprint_of(model)
        _known[model] = before
    return before[1]
