"""Engram: memory for language models that is looked up, not computed.

    import engram_lm
    model = engram_lm.attach(model, tokenizer, engram_lm.MemoryConfig(layers=(1, 5)))

Names load what they need when first used; `import engram_lm` alone imports neither torch nor numba.
"""

from engram_lm.lazy import exports

__version__ = "0.1.0"

_HOME = {
    "MemoryConfig": "config",
    "TokenMap": "vocab",
    "Identity": "addressing",
    "PROFILES": "addressing",
    "Profile": "addressing",
    "resolve": "addressing",
    "attach": "attachment",
    "detach": "attachment",
    "from_pretrained": "attachment",
    "load_shipped": "attachment.shipped",
    "memories": "attachment",
    "memory_off": "attachment",
    "open_rows": "attachment",
    "save_memory": "attachment",
    "trace": "attachment",
    "use_table": "attachment",
    "MemoryTrainer": "training.trainer",
    "load_base": "bases.base",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604

__getattr__, __dir__ = exports(__name__, _HOME)
