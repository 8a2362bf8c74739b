"""Memory in vLLM: a plugin that mixes an index into the distribution of every request (docs/vllm.md).

What it is: one logits processor for both of vLLM's model runners, found by vLLM through the entry-point group
`vllm.logits_processors` wherever this package is installed. It does nothing until an index is named.
What it is not: a server of ours; no other part of vLLM is touched.

    ENGRAM_INDEX=notes ENGRAM_GATE=gate.json vllm serve MODEL
    LLM(MODEL, additional_config={"engram": {"index": "notes", "lambda": 0.25}})

    options.py     what the server and what a request may say
    live.py        an index that is followed while it changes; one step of many rows
    weights.py     which checkpoint a gate meets, read from its files
    plugin.py      vLLM's two interfaces

Loading this module loads neither torch nor numba, and does not need vLLM.
"""

from engram_lm.lazy import exports

_HOME = {
    "Live": "live",
    "MemoryLogitsProcessor": "plugin",
    "RequestOptions": "options",
    "Settings": "options",
    "settings_of": "options",
}

__all__ = [*_HOME]  # noqa: PLE0604

__getattr__, __dir__ = exports(__name__, _HOME)
