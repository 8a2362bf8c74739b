"""Exact N-gram memory of documents: sorted token streams in which every context, of any length, is found at once.

Not the paper's tables: nothing is learned, and a document is known as soon as it is in. It knows wording, not meaning.
So far there are segments alone (`index.segment`, docs/index.md); the store around them is to come.

    segment = Segment.build([[5, 9, 2], [9, 2, 7]], vocab_size=10)
    match = segment.match([5, 9, 2])        # depth 3; intervals of the last 0, 1, 2 and 3 tokens
    segment.continuations(match, 2)         # tokens and counts that followed "9 2"
"""
