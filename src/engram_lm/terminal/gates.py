"""What `engram-lm gate fit` and `gate report` do: fit a gate for a model, and tell what one was measured to do."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from engram_lm.corpus.text import require_documents
from engram_lm.errors import ConfigError, DataError
from engram_lm.generation.loading import load_model, require_parts

NAMES_NONE = "it names no documents that it was fitted on: a shipped gate, or one of an earlier version"


def fit_command(
    name: str, *, index: Path, general: list[str], out: Path, texts: int, bound: float, tenant: str, seed: int,
    plot: Path | None,
) -> None:  # fmt: skip
    """Read `texts` documents and as many general texts with the model, fit, hold to the bound, save."""
    if out.exists():
        raise ConfigError(f"{out} exists already; name another file.")
    if texts < 2:
        raise ConfigError(f"A gate is fitted on at least 2 texts of each kind; got --texts {texts}.")
    for path in (out, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path} cannot be written: {path.parent} is no directory. Make it first.")
    require_parts(name, index)
    require_documents(general)
    from engram_lm.corpus.text import read_documents
    from engram_lm.identity import print_of
    from engram_lm.library import Library
    from engram_lm.mixing import calibrate, collect, fit_gate, rules_of
    from engram_lm.mixing.gate import LookupConfig
    from engram_lm.mixing.gate_provenance import fingerprints
    from engram_lm.mixing.identity import model_print
    from engram_lm.progress import Progress

    model, tokenizer = load_model(name)
    with Library.open(index, tokenizer=tokenizer) as library:
        snapshot = library.store.snapshot(tenant)
        read = (library.encoder.encode(document.text) for document in read_documents(general))
        lists = list(itertools.islice((ids for ids in read if len(ids) >= 64), texts))
        progress = Progress("reading with the model")
        reading = LookupConfig(count="documents")
        fit, held = collect(
            model, snapshot, lists, rules=rules_of(tokenizer, model, snapshot), reading=reading, texts=texts, seed=seed,
            progress=progress,
        )  # fmt: skip
        progress.end()
        documents = fingerprints(snapshot)
    trained_on = {
        "index documents": snapshot.n_documents, "general": sorted(Path(file).name for file in general), "texts": texts,
        "seed": seed, "documents": documents,
    }  # fmt: skip
    gate = calibrate(
        fit_gate(
            fit, general_weight=2.0, reading=reading, tokenizer=print_of(tokenizer).text, model=model_print(model),
            model_name=name, seed=seed, trained_on=trained_on,
        ),
        held,
        bound=bound,
    )  # fmt: skip
    gate.save(out)
    print(f"{out}: fitted on {len(fit):,} positions")
    report_command(out, as_json=False, plot=plot)


def report_command(
    path: Path, *, as_json: bool, plot: Path | None, index: Path | None = None, tenant: str | None = None,
    strict: bool = False,
) -> None:  # fmt: skip
    """What the gate's own file says of it; with an index, whether the documents it was fitted on are still there.

    strict: ConfigError where some are not.
    """
    from engram_lm.mixing import Gate
    from engram_lm.mixing.fit import draw_calibration

    if index is None and (strict or tenant is not None):
        raise ConfigError(
            "--strict and --tenant belong to --index: which documents are still there is for an index to say."
        )
    gate = Gate.load(path)
    fitted, missing, sentence = len(gate.trained_on.get("documents", [])), None, ""
    if index is not None:
        missing, sentence = _missing(gate, index, tenant or "public")
        if strict and sentence:
            raise ConfigError(sentence)
    measured: dict[str, Any] = gate.measured
    if plot is not None:
        if not measured.get("calibration"):
            raise DataError(f"{path} holds no calibration: there is nothing to draw.")
        draw_calibration(measured["calibration"], plot, title=gate.model_name or path.name)
    if as_json:
        facts = {
            "kind": gate.kind,
            "model": gate.model_name,
            "trained_on": {**gate.trained_on, "documents": fitted},
        }
        print(json.dumps({**facts, "documents_gone": missing, **measured}))
        return
    print(f"a {gate.kind} gate for {gate.model_name or 'any model'} ({gate.model[:12] or 'any weights'})")
    if measured:
        print(
            f"general text: at most {100 * measured['worst_general']:+.2f} % perplexity where it was held to "
            f"{100 * measured['bound']:+.2f} %"
        )
    for row in measured.get("groups", []):
        print(
            f"  {row['group']:32} {row['perplexity_alone']:8.2f} → {row['perplexity_mixed']:8.2f}   "
            f"mean λ {row['mean_lambda']:.3f}   {row['tokens']:,} tokens"
        )
    if missing is not None:
        print(
            sentence
            or (f"all {fitted:,} documents it was fitted on are in this index" if fitted else NAMES_NONE)
        )


def _missing(gate: Any, index: Path, tenant: str) -> tuple[int, str]:
    from engram_lm.index.store import Index
    from engram_lm.mixing.gate_provenance import gone, told

    with Index.open(index) as store:
        snapshot = store.snapshot(tenant)
        return gone(gate, snapshot)[1], told(gate, snapshot)
