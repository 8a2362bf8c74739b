"""Token ids to row addresses: profiles, the schemes they resolve to, and their identities. Imports no torch.

    from engram_lm.addressing import PROFILES, resolve

`profile` and `shipped` are data, `resolve` makes `scheme`s, `plain` is the readable twin of the kernel, `device` the
torch form (import it where torch is there), `identity` the content hash, `command` what `engram-lm addresses` prints.
"""

from engram_lm.addressing.identity import Identity
from engram_lm.addressing.inputs import DEAD
from engram_lm.addressing.profile import Profile
from engram_lm.addressing.resolve import resolve
from engram_lm.addressing.scheme import AddressScheme
from engram_lm.addressing.shipped import PROFILES, SHIPPED, Shipped, profile_named

__all__ = [
    "DEAD",
    "PROFILES",
    "SHIPPED",
    "AddressScheme",
    "Identity",
    "Profile",
    "Shipped",
    "profile_named",
    "resolve",
]
