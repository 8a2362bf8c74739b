"""Training runs: options, the Trainer that knows rows, a run in a directory, its measures and its picture.

    from engram_lm.training.config import TrainConfig
    from engram_lm.training.run import train
    outcome = train(TrainConfig(base="smollm2", data=("corpus.jsonl",)), out="runs/first")

What a run needs before its first step is in `engram_lm.bases` and `engram_lm.corpus`.
"""
