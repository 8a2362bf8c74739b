"""Text from a model with its memories: one loop for terminal, page, measures and drafts.

    prompt_ids(tokenizer, prompt)                        # prompts.py: text or a turn, as ids
    select(library, prompt, documents, top_k)            # selection.py: which documents answer
    processor_for(selection, gate, ids, ...)             # processors.py: what mixes them in; gates.py: which gate
    stream(engine, request, processor)                   # decoder.py: tokens as they come; Decoder.step for many rows
    summary(tokens, selection)                           # report.py: what the index did

    engines.py       what a model must give; transformers' models
    caches.py        sequences that join a batch and leave it
    speculative.py   several tokens a forward, read ahead in an index; lossless
    strengths.py     what is painted red; pieces.py: ids to text piece by piece
    loading.py       models by name

Names load what they need when first used.
"""

from engram_lm.lazy import exports

_HOME = {
    "Decoder": "decoder",
    "Drafted": "speculative",
    "Drafts": "speculative",
    "Gives": "engines",
    "HeatView": "strengths",
    "PieceDecoder": "pieces",
    "PromptEncoder": "prompts",
    "Request": "decoder",
    "Selection": "selection",
    "Token": "decoder",
    "TransformersEngine": "engines",
    "load_model": "loading",
    "processor_for": "processors",
    "prompt_ids": "prompts",
    "select": "selection",
    "speculate": "speculative",
    "speculating": "speculative",
    "stream": "decoder",
    "summary": "report",
}

__all__ = [*_HOME]  # noqa: PLE0604

__getattr__, __dir__ = exports(__name__, _HOME)
