"""Which tokenizer, which base: fingerprints of what a thing does, compared wherever two parts must belong together.

What it is: sha256 prints of tokenizers (tokenizers.py) and of base models (bases.py). What it is not: the identity of an
address scheme, which contains one of them (addressing/identity.py).

    tokenizer_fingerprint(tokenizer)            # 64 hexadecimal digits: which ids a text gets
    print_of(tokenizer).is_the_one_of(stored)   # also where an older engram-lm wrote `stored`
    require_base(model, ref=ref)                # IdentityError where the weights are another base's
"""

from engram_lm.identity.bases import BaseRef, fingerprint_of, require_base
from engram_lm.identity.tokenizers import TokenizerPrint, is_marker, print_of, tokenizer_fingerprint

__all__ = [
    "BaseRef",
    "TokenizerPrint",
    "fingerprint_of",
    "is_marker",
    "print_of",
    "require_base",
    "tokenizer_fingerprint",
]
