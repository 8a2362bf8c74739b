"""transformers' decoding cache under both of its names: `past_key_values`, and `cache` from transformers 5.24 on.

    output = model(ids, use_cache=True, **with_cache(model, cache))      # by the name that this model's forward has
    cache = cache_of(output)

Nothing here imports torch or transformers: names are read from signatures, arguments and outputs.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

NAMES = ("cache", "past_key_values")


def cache_name(forward: Callable) -> str | None:
    """The name that a forward gives its cache, or None where it takes none."""
    taken = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in taken), None)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as a keyword of a model's call; empty for None, which every model takes for a beginning."""
    if cache is None:
        return {}
    # a wrapper (PEFT's, torch.compile's) hands on what it does not name
    inner = getattr(model, "_orig_mod", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return {cache_name(model.forward) or cache_name(inner.forward) or NAMES[-1]: cache}


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, under either name; None where there is none."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache of a model's output; None where it made none."""
    return next((getattr(output, name) for name in NAMES if getattr(output, name, None) is not None), None)
