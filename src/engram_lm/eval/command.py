"""What `engram-lm eval` does: plan every measure, refuse what cannot be, then run those that are not finished yet.

    DIR/perplexity.json ...      one file a measure, written when it is done; see `measured`
    DIR/report.md                all of them, written anew after each

Inputs are read and checked before the first measure runs. The same command leaves finished measures alone; other settings
are refused, or with overwrite=True removed before the first measure, so that a stop can be continued. Ctrl-C keeps what is
finished.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engram_lm.bases.naming import find_model
from engram_lm.durable import write_atomic
from engram_lm.errors import ConfigError, DataError
from engram_lm.eval.report import TITLES, report
from engram_lm.eval.result import Result, finished, load, plain, save
from engram_lm.extras import missing
from engram_lm.progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from engram_lm.eval.evaluated_model import EvaluatedModel


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to measure, and how much of it. Lists of files may be empty: then the measure is left out."""

    text: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    pararel: Path | None = None
    benchmarks: tuple[str, ...] = ()
    gates: bool = False
    spans: tuple[str, ...] = ()
    canaries: Path | None = None
    memory: tuple[str, ...] | None = None
    tokens: int = 20_000
    most: int = 200
    pararel_facts: int = 5
    candidates: int = 15
    references: int = 255
    window: int = 512
    stride: int | None = None
    batch_size: int = 1
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        asked = (self.text, self.facts, self.pararel, self.benchmarks, self.spans, self.canaries)
        if not any(asked):
            raise ConfigError(
                "There is nothing to measure: give --text, --facts, --pararel, --benchmarks, --spans or --canaries."
            )
        if self.gates and not (self.text or self.spans):
            raise ConfigError("--gates needs texts: give --text or --spans.")
        if self.training and not (self.text or self.spans):
            raise ConfigError("--training has no effect: n-grams are counted for --text and --spans.")
        for name in ("tokens", "most", "pararel_facts", "candidates", "references", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is 1 or more; got {getattr(self, name)}.")


class _Step(NamedTuple):
    """One measure: its name, what it depends on, and what measures it."""

    name: str
    settings: dict[str, Any]
    run: Callable[[Progress], Result]


def eval_command(name: str, *, out: Path, options: EvalOptions, overwrite: bool, as_json: bool) -> None:
    """Measure, and write OUT/MEASURE.json and OUT/report.md."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --out names a directory.")
    find_model(name)
    inputs = _Inputs.read(options)
    try:
        from engram_lm.eval.evaluated_model import EvaluatedModel
    except ImportError as error:
        raise missing(f"Measuring a model needs torch and transformers ({error})", "hf") from error
    subject = EvaluatedModel.load(name, device=options.device, seed=options.seed)
    steps = _plan(subject, options, inputs)
    _require_one_model(out, steps)
    if overwrite:
        _remove_others(out, steps)
    done = {step.name: finished(step.name, step.settings, out) for step in steps}
    try:
        for n, step in enumerate(steps):
            if done[step.name] is None:
                print(f"{n + 1}/{len(steps)} {step.name} ...", file=sys.stderr, flush=True)
                progress = Progress(step.name)
                measured = step.run(progress)
                progress.end()
                done[step.name] = measured = _complete(measured, step.settings, subject)
                save(measured, out)
                _write_report(out, subject)
            else:
                print(f"{n + 1}/{len(steps)} {step.name}: finished before", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        kept = [name for name, measured in done.items() if measured is not None]
        if kept:
            print(f"{', '.join(kept)} kept in {out}; the same command goes on.", file=sys.stderr)
        raise
    told = _write_report(out, subject)
    results = [measured for measured in done.values() if measured is not None]
    print(json.dumps([one.to_json() for one in results], ensure_ascii=False) if as_json else told.rstrip())


def canaries_command(
    path: Path, *, each: int, controls: int | None, repeats: Sequence[int], digits: int, seed: int,
    documents: Path | None,
) -> None:  # fmt: skip
    """Write canaries, and the documents that hold them as JSON lines."""
    from engram_lm.eval.canaries import documents as documents_of
    from engram_lm.eval.canaries import make, write

    for place in (path, documents):
        if place is not None and not place.suffix == ".jsonl":
            raise ConfigError(f"{place}: canaries are JSON lines; name it .jsonl.")
        if place is not None and not place.parent.is_dir():
            raise DataError(f"{place.parent}: no such directory.")
    found = make(each=each, controls=controls, repeats=repeats, digits=digits, seed=seed)
    write(found, path)
    trained = [canary for canary in found if canary.repeats]
    print(f"{path}: {len(trained)} canaries and {len(found) - len(trained)} controls")
    if documents is not None:
        texts = documents_of(found, seed=seed)
        write_atomic(documents, "".join(json.dumps({"text": text}) + "\n" for text in texts))
        print(f"{documents}: {len(texts)} documents; put them into the training text, and not {path.name}")


@dataclass(frozen=True)
class _Inputs:
    """What needs no model to be read and checked."""

    facts: list[Any]
    answers: dict[str, list[str]]
    relations: list[Any]
    tasks: dict[str, list[Any]]
    marked: dict[str, list[Any]]
    canaries: list[Any]
    files: dict[str, Any]

    @classmethod
    def read(cls, options: EvalOptions) -> _Inputs:
        from engram_lm.corpus.text import find_files
        from engram_lm.eval.benchmarks import require_harness
        from engram_lm.eval.canaries import read as read_canaries
        from engram_lm.eval.consistency import read_pararel
        from engram_lm.eval.environment import described
        from engram_lm.eval.facts import answers_of, read_facts, some
        from engram_lm.eval.perplexity import windows
        from engram_lm.eval.spans import read_spans
        from engram_lm.eval.tasks import find_benchmarks, read_items

        places = find_benchmarks(options.benchmarks) if options.benchmarks else {}
        if places:
            require_harness()
        next(windows(2, window=options.window, stride=_stride(options)))
        facts = read_facts(options.facts) if options.facts else []
        marked = {Path(p).name: read_spans(p, most=options.most, seed=options.seed) for p in options.spans}
        if len(marked) < len(options.spans):
            raise ConfigError(
                "Two files of --spans have the same name; results go by the name, so rename one."
            )
        files = {
            "text": described(find_files(options.text)) if options.text else [],
            "training": described(find_files(options.training)) if options.training else [],
            "facts": described(find_files(options.facts)) if options.facts else [],
            "benchmarks": described(list(places.values())),
            "spans": described([Path(p) for p in options.spans]),
        }
        return cls(
            facts=some(facts, options.most, seed=options.seed), answers=answers_of(facts),
            relations=[] if options.pararel is None
            else read_pararel(options.pararel, facts=options.pararel_facts, seed=options.seed),
            tasks={n: read_items(p, most=options.most, seed=options.seed) for n, p in places.items()},
            marked=marked, canaries=[] if options.canaries is None else read_canaries(options.canaries), files=files,
        )  # fmt: skip


def _plan(subject: EvaluatedModel, options: EvalOptions, inputs: _Inputs) -> list[_Step]:
    from engram_lm.eval import benchmarks, canaries, consistency, facts, gates, perplexity
    from engram_lm.eval.texts import read_texts

    states = options.memory or ("on", "off")
    if subject.states == ("none",) and options.memory is None:
        states = ("none",)
    subject.require_states(states)
    texts = read_texts(options.text, subject.encode, tokens=options.tokens) if options.text else []
    trained_on = inputs.files["training"] or None
    window = options.window
    if texts and subject.context is not None and window > subject.context:
        raise ConfigError(f"{subject.name} reads {subject.context:,} tokens; --window is {window:,}.")
    model = {k: v for k, v in subject.facts().items() if k != "model"}
    steps: list[_Step] = []

    def step(name: str, about: dict[str, Any], run: Callable[[Progress], Result], *files: str) -> None:
        read = {f"{kind} files": inputs.files[kind] for kind in files if inputs.files[kind]}
        drawn = subject.drawn(about.get("states", ()))
        steps.append(_Step(name, plain({**model, **about, **drawn, **read}), run))

    def training() -> Iterator[np.ndarray] | None:
        return _training_ids(options.training, subject) if options.training else None

    if texts:
        reading = {"states": states, "window": window, "stride": _stride(options), "trained_on": trained_on}
        step(
            "perplexity", perplexity.settings(texts, **reading),
            lambda progress: perplexity.perplexity(
                subject, texts, training=training(), progress=progress, **reading
            ),
            "text",
        )  # fmt: skip
    if inputs.facts:
        asking: dict[str, Any] = {
            "states": states, "candidates": options.candidates, "seed": options.seed, "answers": inputs.answers,
        }  # fmt: skip
        step(
            "facts", facts.settings(inputs.facts, **asking),
            lambda progress: facts.facts_measured(subject, inputs.facts, progress=progress, **asking), "facts",
        )  # fmt: skip
    if inputs.relations:
        choosing = {"states": states, "candidates": options.candidates, "seed": options.seed}
        step(
            "consistency", consistency.settings(inputs.relations, **choosing),
            lambda progress: consistency.consistency(subject, inputs.relations, progress=progress, **choosing),
        )  # fmt: skip
    if inputs.tasks:
        harness = benchmarks.require_harness()
        step(
            "benchmarks", benchmarks.settings(inputs.tasks, states=states, harness=harness),
            lambda progress: benchmarks.benchmarks(
                subject, inputs.tasks, states=states, batch_size=options.batch_size
            ),
            "benchmarks",
        )  # fmt: skip
    if options.gates or inputs.marked:
        seen = {"window": window, "trained_on": trained_on}
        read = texts if options.gates else []
        subject.require_gates()
        step(
            "gates", gates.settings(read, inputs.marked, **seen),
            lambda progress: gates.gates(
                subject, texts=read, marked=inputs.marked, training=training(), progress=progress, **seen
            ),
            "text", "spans",
        )  # fmt: skip
    if inputs.canaries:
        exposing = {"states": states, "references": options.references, "seed": options.seed}
        step(
            "canaries", canaries.settings(inputs.canaries, **exposing),
            lambda progress: canaries.exposure(subject, inputs.canaries, progress=progress, **exposing),
        )  # fmt: skip
    return steps


def _require_one_model(out: Path, steps: Sequence[_Step]) -> None:
    """ConfigError where `out` holds other measures of another model: one report would tell both as one."""
    planned, wanted = {step.name for step in steps}, steps[0].settings
    for path in sorted(out.glob("*.json")):
        if path.stem in TITLES and path.stem not in planned:
            found = load(path)
            if any(found.settings.get(name) != wanted[name] for name in ("base_sha256", "memory_sha256")):
                raise ConfigError(
                    f"{path} is of another model ({found.facts.get('model')}); give another --out, or remove it."
                )


def _remove_others(out: Path, steps: Sequence[_Step]) -> None:
    """Remove what the planned measures found with other settings or another model; what is of these stays."""
    for step in steps:
        try:
            finished(step.name, step.settings, out)
        except (ConfigError, DataError):
            (out / f"{step.name}.json").unlink()


def _stride(options: EvalOptions) -> int:
    return max(1, options.window // 2) if options.stride is None else options.stride


def _training_ids(files: Sequence[str], subject: EvaluatedModel) -> Iterator[np.ndarray]:
    """Ids of every training document, tokenised once and then read from the user's cache directory."""
    from engram_lm.corpus.tokenised import tokenise

    corpus = tokenise(list(files), tokenizer=subject.tokenizer)
    for n in range(len(corpus)):
        # without the end id: no text that is measured holds it
        yield corpus.document(n)[:-1]


def _complete(measured: Result, settings: dict[str, Any], subject: EvaluatedModel) -> Result:
    from engram_lm.eval.environment import circumstances

    facts = {
        **measured.facts,
        "model": subject.name,
        "circumstances": circumstances(),
        "command": _command_line(),
    }
    return replace(measured, settings=settings, facts=facts)


def _command_line() -> str:
    import shlex

    return (
        shlex.join(["engram-lm", *sys.argv[1:]])
        if Path(sys.argv[0]).stem in ("engram-lm", "__main__")
        else ""
    )


def _write_report(out: Path, subject: EvaluatedModel) -> str:
    results = [load(out / f"{name}.json") for name in TITLES if (out / f"{name}.json").exists()]
    told = report(results, model=subject.name, about=_about(results))
    write_atomic(out / "report.md", told)
    return told


def _about(results: Sequence[Result]) -> list[str]:
    """Machine, versions and commit, once where they are those of every result."""
    found = [measured.facts.get("circumstances", {}) for measured in results]
    lines = {
        f"{f.get('cpu')}, {f.get('threads')} of {f.get('cores')} threads"
        f"{', ' + f['accelerator'] if f.get('accelerator') else ''}; "
        f"{', '.join(f'{n} {v}' for n, v in f.get('versions', {}).items() if v)}"
        f"{', commit ' + f['commit'][:12] if f.get('commit') else ''}{' with changes' if f.get('dirty') else ''}."
        for f in found
    }
    return sorted(lines) if len(lines) == 1 else []
