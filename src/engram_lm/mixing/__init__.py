"""Memory mixed into any model's distribution: P = (1 - lambda) P_model + lambda P_memory (docs/mixing.md).

    from engram_lm.mixing import default_gate, memory_processor, rules_of, score
    processor = memory_processor(snapshot, default_gate("smollm2"), input_ids, attention_mask,
                                 tokenizer=tokenizer, model=model)
    model.generate(input_ids, attention_mask=attention_mask, logits_processor=[processor])
    score(model, ids, snapshot, default_gate("smollm2"), rules=rules_of(tokenizer, model, snapshot)).perplexity()

    mix.py, onepass.py   the equation, its kernels, its plain twin; which tokens memory may speak of; on_device.py: in torch
    lookups.py           look-ups as evidence
    features.py, gate.py lambda from evidence; gate files
    gate_examples.py     examples for a gate, from an index and a model (torch)
    fit.py               fitting and bounding a gate
    mixer.py             lambda and the mixture for whoever decodes or scores: the one place
    scoring.py           whole texts (torch)
    processor.py         transformers' generate (torch); trace.py, what it records
    session.py           what a request has said so far, as one more document
    identity.py          which model and tokenizer
    gate_provenance.py   which documents a gate was fitted on

Names load what they need when first used.
"""

from engram_lm.lazy import exports

_HOME = {
    "FixedLambda": "gate",
    "Gate": "gate",
    "LookupConfig": "gate",
    "default_gate": "gate",
    "TokenRules": "mix",
    "token_rules": "mix",
    "SessionMemory": "session",
    "MemoryStep": "trace",
    "summary": "trace",
    "MemoryProcessor": "processor",
    "Mixer": "mixer",
    "memory_processor": "processor",
    "require_identity": "identity",
    "rules_of": "identity",
    "Scored": "scoring",
    "score": "scoring",
    "collect": "gate_examples",
    "Examples": "fit",
    "calibrate": "fit",
    "fit_gate": "fit",
}

__all__ = [*_HOME]  # noqa: PLE0604

__getattr__, __dir__ = exports(__name__, _HOME)
