"""A library: an index directory with the tokenizer its ids come from, so that texts go in and come out.

Exact N-gram memory knows wording: what it finds is what was written, word for word. No torch, no model.

    with Library.create("notes", tokenizer=tokenizer) as library:
        library.add(read_texts(["handbook/", "faq.jsonl"]))
        library.search("annual leave")             # which documents say it, and where
        library.explain("Annual leave is")         # what memory says comes next, and from where
    library.chosen("How long is my leave?", 3) # which documents a question in other words is about
        library.delete(["handbook/leave.md"])
"""

from typing import TYPE_CHECKING

from engram_lm.lazy import exports

if TYPE_CHECKING:
    from engram_lm.library.choosing import Chosen
    from engram_lm.library.library import Explanation, Hit, Library
    from engram_lm.library.texts import Text, read_texts

_WHERE = {
    "Chosen": "choosing", "Explanation": "library", "Hit": "library", "Library": "library", "Text": "texts",
    "read_texts": "texts",
}  # fmt: skip
__all__ = ["Chosen", "Explanation", "Hit", "Library", "Text", "read_texts"]

__getattr__, __dir__ = exports(__name__, _WHERE)
