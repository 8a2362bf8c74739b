"""What the page offers to begin with, for any model. A demo brings its own in examples.json, in the same form.

look: texts to trace; think: prompts with candidates whose chances are compared; ask: prompts to generate from, with chat
true where they are a user's turn. Names may be {"en": ..., "zh": ...}.
"""

import json
from pathlib import Path
from typing import Any

from engram_lm.errors import DataError

KINDS = ("look", "think", "ask")

EXAMPLES: dict[str, list[Any]] = {
    "look": [
        {
            "name": {"en": "Names of several tokens", "zh": "由几个词组成的名字"},
            "text": "Only Alexander the Great could tame the horse Bucephalus. Diana, Princess of Wales, was born in 1961. "
            "By the way, the Milky Way is a galaxy.",
        },
        {
            "name": {"en": "The four great inventions", "zh": "四大发明"},
            "text": "中国古代四大发明是造纸术、印刷术、火药和指南针。",
        },
        {
            "name": {"en": "A physician of the Han dynasty", "zh": "医圣张仲景"},
            "text": "东汉末年的医学家张仲景被称为医圣，著有《伤寒杂病论》。",
        },
    ],
    "think": [
        {
            "name": {"en": "The first president", "zh": "第一任总统"},
            "prompt": "The first president of the United States was",
            "candidates": ["George Washington", "Thomas Jefferson", "Abraham Lincoln"],
        },
        {
            "name": {"en": "Names, in two scripts", "zh": "两种文字的名字"},
            "prompt": "Only one of them could tame the horse Bucephalus:",
            "candidates": ["Alexander the Great", "the Princess of Wales", "张仲景", "四大发明"],
        },
        {
            "name": {"en": "四大发明", "zh": "四大发明"},
            "prompt": "造纸术、印刷术、火药和指南针合称",
            "candidates": ["四大发明", "张仲景", "Alexander the Great"],
        },
    ],
    "ask": [{"name": {"en": "A famous name", "zh": "一个名字"}, "prompt": "Alexander the Great was"}],
}


def read_examples(path: Path) -> dict[str, list[Any]]:
    """Examples of a file. DataError where it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf8"))
        if set(found) != set(KINDS) or not all(isinstance(entries, list) for entries in found.values()):
            raise ValueError(f"wanted lists named {', '.join(KINDS)}")
        return found
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} holds no examples ({error}).") from None
