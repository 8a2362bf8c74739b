"""Controls of a memory: the same config with one thing taken away.

    memory           the config as it is
    one-row          every n-gram of a head reads one row: does it matter what is looked up?
    shuffled         rows are dealt anew in every forward: does it matter that a row stays with its n-gram?
    frozen-random    random rows that never train: do rows have to learn, or are random keys enough?
    unigram          order 1 alone, as many rows and lookups: does the context of a token matter?

All read as many rows a token as the memory and have its projection, gate and conv. What each control does is in
`engram_lm.memory.controls`; a saved model says which one it is.

    for name in MEMORY_ARMS:
        model = attach(build(), tokenizer, control(config, name))
"""

from dataclasses import replace

from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError

MEMORY_ARMS = ("memory", "one-row", "shuffled", "frozen-random", "unigram")


def control(config: MemoryConfig, name: str) -> MemoryConfig:
    """`config` as the arm `name`; ConfigError for another name, or for a config that is a control already."""
    if name not in MEMORY_ARMS:
        raise ConfigError(f"The controls of a memory are {', '.join(MEMORY_ARMS)}; got {name!r}.")
    if config.control is not None:
        raise ConfigError(
            f"The memory is the control {config.control!r} already; begin from an ordinary one."
        )
    if name == "memory":
        return config
    if name != "unigram":
        return replace(config, control=name)
    from engram_lm.attachment import profile_of

    profile = profile_of(config)
    return replace(
        config,
        orders=(1,),
        # as many heads of the same size, so that as many rows are kept and read
        heads=profile.columns,
        conv_dilation=profile.conv_dilation if profile.conv_kernel else None,
    )
