"""What a model knows and what its memory adds, measured: `engram-lm eval`. One measure a file, one protocol for all models.

    engram-lm eval my-memory --text held-out.txt --training corpus.jsonl --facts probes.jsonl --out report

    evaluated_model.py   any model, in a state of its memory: what it says about token ids
    result.py        the record that every measure returns, and its files
    intervals.py     bootstrap intervals
    tables.py        numbers in Markdown
    texts.py         documents of files, as many tokens as asked for
    frequency.py     how often an n-gram was seen in training text
    perplexity.py    perplexity, also by frequency
    facts.py         facts completed: the document's words and others, against the most common answer
    consistency.py   the same answer whatever the wording (ParaRel)
    benchmarks.py    LAMBADA, ARC, PIQA, Winogrande, OpenBookQA through lm-evaluation-harness; tasks.py: their files
    gates.py         gates by frequency and by entity spans; spans.py: texts with marked entities
    canaries.py      invented secrets: made, and their exposure after training
    report.py        report.md of a directory
    command.py       the command

Each measure is a function of an `EvaluatedModel` that returns a `Result`.
"""
