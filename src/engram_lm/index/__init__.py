"""Exact N-gram memory of documents: sorted token streams in which every context, of any length, is found at once.

Not the paper's tables: nothing is learned, and a document is known as soon as it is in. It knows wording, not meaning.
Segments (`index.segment`, docs/index.md) hold documents, an `Index` (`index.store`, docs/store.md) is a directory of them.

    with Index.create("notes", vocab_size=49_152, tokenizer=fingerprint) as index:
        index.add([("a.txt", [5, 9, 2, 7])])
        index.snapshot().longest([5, 9])    # (2, tokens, counts)
    segment = Segment.build([[5, 9, 2], [9, 2, 7]], vocab_size=10)
    match = segment.match([5, 9, 2])        # depth 3; intervals of the last 0, 1, 2 and 3 tokens
    segment.continuations(match, 2)         # tokens and counts that followed "9 2"
"""

from engram_lm.lazy import exports

_HOME = {
    "BlendedSnapshot": "compressed",
    "Document": "segment",
    "Index": "store",
    "LiveSegment": "live_segment",
    "PurgeReport": "purging",
    "Segment": "segment",
    "Snapshot": "snapshot",
    "Stats": "store",
    "VerifyReport": "checking",
}

__all__ = [*_HOME]  # noqa: PLE0604

__getattr__, __dir__ = exports(__name__, _HOME)
