"""The four shipped profiles, and the vocabularies and layers that their released models use them with.

`paper`          arXiv 2601.07372 and its demo code; head width 80 is the paper's 1280 over 16 heads
`deepseek-v4.1`  released code; the fill also stands for image spans and padding (DEAD)
`qwen-ple`       Qwen4-Exp and Qwen3.8-Flash-Next; transformers' `models/qwen4_exp`
`longcat`        LongCat-Flash-Lite (arXiv 2601.21204): a polynomial in the vocabulary size, no gate

A default is what the released model has. Anything else (another tokenizer, other layers) is passed to `resolve`.
"""

from dataclasses import dataclass

from engram_lm.addressing.profile import Profile
from engram_lm.errors import ConfigError

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="paper",
            orders=(2, 3),
            heads=8,
            id_space="canonical",
            multipliers="pcg64",
            moduli="distinct-primes",
            seed=0,
            rows_per_head=646_400,
            stop=("start",),
            fill="pad",
            head_width=80,
            conv_kernel=4,
            conv_dilation=3,
            gate="signed-sqrt",
            projection_bias=True,
        ),
        Profile(
            name="deepseek-v4.1",
            orders=(2, 3, 4),
            heads=8,
            id_space="canonical",
            multipliers="pcg64",
            moduli="distinct-primes",
            seed=0,
            rows_per_head=16_000_000,
            stop=("start", "dead"),
            fill="pad",
            head_width=256,
            conv_kernel=0,
            gate="signed-sqrt",
        ),
        # A masked place becomes an EOS id and stops look-back as one, so "dead" needs no rule of its own.
        Profile(
            name="qwen-ple",
            orders=(2, 3),
            heads=8,
            id_space="raw",
            multipliers="splitmix64",
            moduli="distinct-primes",
            seed=1234,
            rows_per_head=20_000_000,
            row_multiple=128,
            stop=("start", "eos"),
            fill="eos",
            head_width=160,
            conv_kernel=4,
            conv_dilation=3,
            gate="signed-sqrt",
        ),
        Profile(
            name="longcat",
            orders=(2, 3, 4),
            heads=4,
            id_space="raw",
            multipliers="polynomial",
            moduli="odd",
            rows_per_head=78 * 131_072,
            stop=("start", "dead", "eos"),
            fill="zero",
            head_width=256,
            conv_kernel=0,
            gate="none",
            fusion="mean",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """What `resolve` needs beside the profile, as the released model has it. Layers are 0-based blocks."""

    vocab_size: int
    layers: tuple[int, ...]
    pad_id: int | None = None
    # Empty: the released files do not fix it, so the caller gives it.
    eos_ids: tuple[int, ...] = ()


SHIPPED: dict[str, Shipped] = {
    "paper": Shipped(vocab_size=98_627, layers=(1, 15), pad_id=2),
    "deepseek-v4.1": Shipped(vocab_size=99_092, layers=(1, 14), pad_id=2),
    "qwen-ple": Shipped(vocab_size=248_320, layers=(1,)),
    # The input embedding counts as layer 0.
    "longcat": Shipped(vocab_size=131_072, layers=(0,), eos_ids=(2,)),
}


def profile_named(name: str) -> Profile:
    """A shipped profile by name, or an error that lists them."""
    if name not in PROFILES:
        raise ConfigError(f"There is no profile {name!r}. Shipped: {', '.join(PROFILES)}.")
    return PROFILES[name]
