"""How much one request may ask for. What exceeds a limit is refused with the limit's number in the sentence, never cut.

limits = Limits(waiting=8)
"""

from dataclasses import dataclass, fields

from engram_lm.errors import ConfigError

# A token is hardly ever longer; texts beyond this need not be tokenised to be refused.
MOST_CHARACTERS_A_TOKEN = 40


@dataclass(frozen=True, kw_only=True)
class Limits:
    """body_bytes: of a request's body, counted while it is read. text_tokens: of a text or prompt that the model reads.

    new_tokens: of one generation. waiting: requests in the line before the model; requests: open at once, of any kind.
    candidates: of one look at the next token. documents: of one addition. id_characters: of a document's id.
    body_seconds: until a body must have arrived.
    """

    body_bytes: int = 2 << 20
    text_tokens: int = 1024
    new_tokens: int = 256
    waiting: int = 64
    requests: int = 256
    candidates: int = 8
    documents: int = 200
    id_characters: int = 200
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigError(
                    f"{field.name} of the limits is more than 0; got {getattr(self, field.name)!r}."
                )
