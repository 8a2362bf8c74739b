"""What memory of some documents does for a model, measured on those documents: alone, memory, retrieval in the prompt.

    engram-lm adapt smollm2 handbook/ --out report         # report/report.md, report/results.json, report/index

    texts.py     documents in two halves, windows of them, copied text found out
    arms.py      a window read once by the model and scored by every arm
    passages.py  BM25: the passage that goes before a window, or before a question
    answers.py   questions answered by every arm
    kept.py      rows in files, so that a stopped run goes on
    report.py    perplexities with intervals, and the report
    command.py   the command

experiments/instant_adaptation measures with the same parts.
"""
