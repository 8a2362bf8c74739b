"""Text and options of training runs small enough for the fast set: a step is a few hundredths of a second."""

import random
from pathlib import Path

from engram_lm.training.config import TrainConfig

WORDS = [
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "log",
    "and",
    "then",
    "saw",
    "a",
    "red",
    "blue",
]
WORDS += ["bird", "fish", "who", "sang", "–", "naïve", "日本", "said"]

TINY = {
    "base": "scratch:tiny",
    "layers": (1, 2),
    "heads": 2,
    "rows_per_head": 211,
    "head_width": 8,
    "tokens": 1536,
    "sequence_length": 32,
    "batch_size": 4,
    "holdout": 0.1,
    "eval_tokens": 128,
    "save_every": 4,
    "eval_every": 6,
    "learning_rate": 3e-3,
    "device": "cpu",
}


def write_text(path: Path, *, paragraphs: int = 120) -> Path:
    draw = random.Random(7)
    texts = (" ".join(draw.choices(WORDS, k=draw.randint(8, 24))) + "." for _ in range(paragraphs))
    path.write_text("\n\n".join(texts) + "\n", encoding="utf8")
    return path


def tiny_config(text: Path, **options) -> TrainConfig:
    return TrainConfig(**TINY | {"data": (str(text),)} | options)


def command_line(text: Path, out: Path, **options) -> list[str]:
    """`engram-lm train` with the options of TINY."""
    chosen = TINY | options
    tokens = ["train", str(chosen.pop("base")), "--data", str(text), "--out", str(out)]
    for name, value in chosen.items():
        if value is not None:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            tokens += [f"--{name.replace('_', '-')}", shown]
    return tokens
