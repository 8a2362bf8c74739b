"""What `engram-lm ablate` does with its options."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from engram_lm.ablation.plan import Plan, arms_of
from engram_lm.ablation.run import ablate, require_ready
from engram_lm.errors import ConfigError
from engram_lm.extras import missing
from engram_lm.training.command import numbers
from engram_lm.training.config import TrainConfig, read_options

_FINISHED, _INTERRUPTED = 0, 130


def ablate_command(given: dict[str, Any]) -> int:
    """Train, measure and draw with the options given (None left out); return the exit code."""
    out = Path(given.pop("out"))
    if given.pop("draw", False):
        extra = sorted(given)
        if extra:
            raise ConfigError(
                f"--draw reads the results in --out; --{extra[0].replace('_', '-')} has no effect."
            )
        return _draw(out)
    arms, seeds = given.pop("arms", None), given.pop("seeds", "0")
    minutes, texts, rates = given.pop("minutes", None), given.pop("texts", None), given.pop("rates", None)
    train_from, config_file = given.pop("train_from", None), given.pop("config", None)
    options = {} if config_file is None else read_options(config_file)
    for name in ("layers", "orders"):
        if name in given:
            given[name] = numbers(given[name], name)
    shared = TrainConfig.from_json(options | given)
    plan = Plan(
        shared=shared,
        arms=arms_of(shared) if arms is None else tuple(part for part in arms.replace(",", " ").split()),
        seeds=numbers(seeds, "seeds"),
        train_from=train_from,
        rates=_rates(rates),
        texts=_texts(texts or []),
    )
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"minutes must be greater than 0; got {minutes}.")
    require_ready(plan, out)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        import matplotlib  # noqa: F401
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing(f"ablate needs torch, transformers, peft and matplotlib ({error})", "hf") from error
    from engram_lm.training.progress import shown_progress

    state = ablate(
        plan,
        out=out,
        minutes=minutes,
        progress=shown_progress(),
        command=shlex.join(["engram-lm", *sys.argv[1:]]),
    )
    if state != "finished":
        print(f"{state}; what is done stays, and the same command goes on")
        return _INTERRUPTED if state == "interrupted" else _FINISHED
    return _draw(out)


def _draw(out: Path) -> int:
    from engram_lm.ablation.report import PICTURE, REPORT, draw

    print(draw(out))
    print(f"\n{out / REPORT}, {out / PICTURE}")
    return _FINISHED


def _texts(files: list[str]) -> dict[str, str]:
    """NAME=FILE, or FILE under its own name."""
    found: dict[str, str] = {}
    for given in files:
        name, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            name, path = Path(given).name.split(".")[0], given
        if name in found:
            raise ConfigError(f"Two texts are called {name!r}; name them: --texts NAME=FILE.")
        found[name] = path
    return found


def _rates(given: str | None) -> dict[str, float]:
    """lora=5e-4,continued=1e-4"""
    found = {}
    for part in (given or "").replace(",", " ").split():
        arm, _, rate = part.partition("=")
        try:
            found[arm] = float(rate)
        except ValueError:
            raise ConfigError(f"rates are ARM=RATE with commas between; got {part!r}.") from None
        if not found[arm] > 0:
            raise ConfigError(f"The rate of {arm} must be greater than 0; got {rate}.")
    return found
