"""Every arm of a plan trained and measured, one after the other, in one directory.

    OUT/ablation.json              what the arms have in common, and the sizes of the model
    OUT/runs/ARM-SEED/             a training run each, as `engram-lm train` writes it; its checkpoints go when it is over
    OUT/results/ARM-SEED.json      what was measured, written whole when the arm is finished
    OUT/ablation.md, ablation.png  all arms, see `report`

What has a result is not run again; a run that was cut off goes on from its checkpoint, on a CPU bit for bit. Arms and seeds
may be added later.

    state = ablate(Plan(...), out="runs/ablation")
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any, Literal

from engram_lm.ablation.plan import Plan
from engram_lm.ablation.sizes import Sizes, sizes_of
from engram_lm.bases.naming import find_base
from engram_lm.corpus.text import find_files, require_documents
from engram_lm.durable import write_atomic
from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.training.progress import Progress, Quiet

FORMAT, VERSION = "engram-lm ablation", 1
COMMON, RESULTS, RUNS = "ablation.json", "results", "runs"

State = Literal["finished", "interrupted", "out of time"]


def ablate(
    plan: Plan,
    *,
    out: str | Path,
    minutes: float | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> State:
    """Train and measure every arm of `plan` that has no result yet. minutes: stop after so long, with a checkpoint."""
    from engram_lm.training.directory import alone_in

    out, progress, begin_s = Path(out), progress or Quiet(), time.perf_counter()
    known = require_ready(plan, out)
    files = _digests(plan)
    if known is not None:
        _require_same_files(out, known.get("files", {}), files)
    sizes = Sizes.from_json(known["sizes"]) if known else sizes_of(plan.shared, train_from=plan.train_from)
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out, "ablate"):
        if known is None:
            common = {
                "format": FORMAT,
                "version": VERSION,
                "options": plan.options(),
                "files": files,
                "sizes": sizes.to_json(),
            }
            write_atomic(out / COMMON, json.dumps(common, indent=1) + "\n")
        (out / RESULTS).mkdir(exist_ok=True)
        todo = [(arm, seed) for seed in plan.seeds for arm in plan.arms]
        for number, (arm, seed) in enumerate(todo, start=1):
            path = out / RESULTS / f"{arm}-{seed}.json"
            if path.exists():
                continue
            left = None if minutes is None else minutes - (time.perf_counter() - begin_s) / 60
            if left is not None and left <= 0:
                return "out of time"
            progress.say(f"arm {number} of {len(todo)}: {arm}, seed {seed}")
            state = _arm(plan, arm, seed, sizes, out, path, left, progress, command)
            if state != "finished":
                return state
    return "finished"


def require_ready(plan: Plan, out: Path) -> dict[str, Any] | None:
    """ablation.json where `out` holds this ablation, None for a new one. What is not there, or cannot go on, is said without
    torch: CheckpointError, ConfigError or DataError."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; --out names a directory.")
    for files in (plan.shared.data, *plan.texts.values()):
        require_documents(files, field=plan.shared.field)
    known = _common(out)
    if known is not None:
        _require_same(out, known["options"], plan)
    elif out.is_dir() and any(path.name != ".lock" for path in out.iterdir()):
        raise CheckpointError(f"{out} is not empty and holds no ablation; name another --out.")
    find_base(plan.shared.base)
    return known


def read_results(out: Path) -> list[dict[str, Any]]:
    """Every result, in no particular order. CheckpointError for a file that is none."""
    found = []
    for path in sorted((out / RESULTS).glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf8"))
            if (data["format"], data["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {data['format']!r} version {data['version']!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no result of an ablation ({error}); delete it.") from None
        found.append(data)
    return found


def _arm(
    plan: Plan,
    arm: str,
    seed: int,
    sizes: Sizes,
    out: Path,
    path: Path,
    minutes: float | None,
    progress: Progress,
    command: str,
) -> State:
    from engram_lm.ablation.measure import load_arm, losses_of, texts_of
    from engram_lm.eval.environment import circumstances, described
    from engram_lm.training.metrics import read_metrics

    directory, trained = out / RUNS / f"{arm}-{seed}", {}
    if plan.trains(arm):
        config = plan.config(arm, seed, sizes, minutes=minutes)
        begin_cpu_s = time.process_time()
        state = _train(config, directory, progress)
        if state != "finished":
            return state
        cpu_s = time.process_time() - begin_cpu_s
        facts = json.loads((directory / "run.json").read_text(encoding="utf8"))
        records = [record for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]
        trained = {
            "config": config.to_json() | {"minutes": None},
            "steps": facts["steps"],
            "tokens": facts["results"]["tokens"],
            "corpus": facts["corpus"],
            "trained_parameters": facts["results"]["trained_parameters"],
            "tables_mb": facts["results"]["tables_mb"] if config.control not in ("bias", "off") else 0.0,
            "last_training_loss": records[-1]["loss"] if records else None,
            # of the last call: loading included, tokens of earlier calls not
            "cpu_seconds_of_last_call": round(cpu_s, 1),
            # by the clock of this machine at that time; other work on it counts
            "tokens_per_second": records[-1]["tokens_per_second"] if records else None,
        }
        model, tokenizer = load_arm(directory)
    else:
        from engram_lm.bases.base import load_base

        model, tokenizer, _ = load_base(plan.shared.base, dtype="float32", report=lambda line: None)
    begin_s, losses = time.perf_counter(), {}
    for name, blocks in texts_of(plan.shared, plan.texts, tokenizer).items():
        found = losses_of(model, blocks)
        losses[name] = {"sums": found.sums, "counts": found.counts}
        mean = sum(found.sums) / sum(found.counts)
        progress.say(f"{arm}, seed {seed}: {name} {mean:.4f} nats a token over {sum(found.counts):,} tokens")
    result = {
        "format": FORMAT,
        "version": VERSION,
        "arm": arm,
        "seed": seed,
        **trained,
        "losses": losses,
        "measuring_seconds": round(time.perf_counter() - begin_s, 1),
        "sizes": sizes.to_json(),
        "data": described(find_files(list(plan.shared.data))),
        "texts": {name: described(find_files(files)) for name, files in plan.texts.items()},
        "command": command,
        "circumstances": circumstances(),
    }
    write_atomic(path, json.dumps(result, indent=1) + "\n")
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    return "finished"


def _train(config: Any, directory: Path, progress: Progress) -> State:
    """Begin the run, or go on with it, or find it finished (killed before it was measured)."""
    from engram_lm.training.run import train

    facts = directory / "run.json"
    if facts.exists() and json.loads(facts.read_text(encoding="utf8"))["state"] == "finished":
        return "finished"
    return train(config, out=directory, progress=progress).state


def _common(out: Path) -> dict[str, Any] | None:
    path = out / COMMON
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf8"))
        if (data["format"], data["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {data['format']!r} version {data['version']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no ablation that this build reads ({error}).") from None
    return data


def _require_same(out: Path, before: dict[str, Any], plan: Plan) -> None:
    now = json.loads(json.dumps(plan.options()))
    flat = [
        {**options["shared"], **{k: v for k, v in options.items() if k != "shared"}}
        for options in (before, now)
    ]
    for name in sorted(flat[0].keys() | flat[1].keys()):
        was, asked = (options.get(name) for options in flat)
        if was != asked:
            raise ConfigError(
                f"{out} was begun with {name} {was!r}; this command says {asked!r}. Arms of other options cannot be "
                "compared: use the same, or another --out."
            )


def _digests(plan: Plan) -> dict[str, str]:
    """sha256 of every file that arms are trained and measured on, by name."""
    from engram_lm.eval.environment import described

    every = [path for files in (list(plan.shared.data), *plan.texts.values()) for path in find_files(files)]
    return {str(path): one["sha256"] for path, one in zip(every, described(every), strict=True)}


def _require_same_files(out: Path, before: dict[str, str], now: dict[str, str]) -> None:
    for path, digest in now.items():
        if before.get(path, digest) != digest:
            raise ConfigError(
                f"{path} is not what it was when {out} was begun. Arms of other text cannot be compared: put it back, or "
                "name another --out."
            )
