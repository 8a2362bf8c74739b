"""The exceptions of this package: each message says what was got, what was wanted, and the next step.

Every class also derives from the built-in exception a caller would expect, so `except ValueError` keeps working.
"""


class EngramError(Exception):
    """Anything that this package refuses to do. `engram-lm` prints it as one line, without a traceback."""


class ConfigError(EngramError, ValueError):
    """A configuration that cannot be: an unknown key, a size that does not divide, an option without effect."""


class TokenIdError(EngramError, ValueError):
    """A token id outside the vocabulary, or ids of the wrong shape or type."""


class AddressError(EngramError, IndexError):
    """A row address outside the table. Raised before anything is read."""


class IdentityError(EngramError, ValueError):
    """Two address identities that should be equal are not: the rows would mean something else."""


class ModelError(EngramError, TypeError):
    """A model that memory cannot be attached to, or an input that such a model cannot take."""


class StateError(EngramError, RuntimeError):
    """Decoding state that does not belong to this forward: the answer would be a wrong number."""


class RowUpdateError(EngramError, RuntimeError):
    """Row gradients that would be lost, or a way of training that the rows do not support."""


class CheckpointError(EngramError, ValueError):
    """Files that do not hold what they should: missing, cut short, or of another kind."""


class DataError(EngramError, ValueError):
    """Text that cannot be used: empty, in another encoding, without the expected field, or too short."""


class MissingExtraError(EngramError, ImportError):
    """A part of this package that needs an extra which is not installed."""


class TenantError(EngramError, PermissionError):
    """A request for documents without a token that allows it."""
