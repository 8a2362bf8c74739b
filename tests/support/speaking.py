"""One prompt decoded, for tests: `speak(model, tokenizer, ids, max_new_tokens=9)` is a list of tokens."""

from typing import Any

from engram_lm.generation import Request, Token, TransformersEngine, stream


def speak(
    model: Any, tokenizer: Any, ids: list[int], *, processor: Any = None, drafter: Any = None, **options: Any
) -> list[Token]:
    request = Request(ids=ids, **options)
    return list(stream(TransformersEngine(model, tokenizer), request, processor, drafter=drafter))
