"""Refusals as HTTP answers: a status and {"error": one sentence}. What is unexpected is told in the terminal alone.

raise Refusal(404, "There is no document 'leave.md' in the index.")
status, sentence = answer_to(error)
"""

import logging

from engram_lm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngramError,
    MissingExtraError,
    TokenIdError,
)

LOG = logging.getLogger("engram_lm.serve")
INTERNAL = "Something went wrong inside the server; the terminal that runs it says what."


class Refusal(EngramError):
    """A request that is not done. status: of HTTP."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Cancelled(BaseException):
    """Whoever asked has gone. No `Exception`: nothing on the way may take it for an error of its own."""


def answer_to(error: BaseException) -> tuple[int, str]:
    """(status, sentence) of any exception; an unexpected one is logged with its trace and told to nobody else."""
    if isinstance(error, Refusal):
        return error.status, str(error)
    if isinstance(error, MissingExtraError):
        LOG.error("a request failed: %s", error)  # its command names a path of this machine
        return 501, "A library that this needs is not installed on the server; its terminal says which."
    if isinstance(error, DataError | ConfigError | TokenIdError):
        return 422, str(error)
    if isinstance(error, CheckpointError) and "is being written by" in str(error):
        return 503, "Another process is changing the index right now; try again in a moment."
    LOG.error("a request failed", exc_info=error)
    return 500, INTERNAL


def shown(text: str, most: int = 60) -> str:
    """Something a visitor sent, short and quoted, for a sentence."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    return ascii(text) if not text.isprintable() else f"'{text}'"
