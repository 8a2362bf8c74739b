"""infini-gram 2.6.0 as the memory, with the gate that was fitted for ours (part of run.py).

Its distribution is that of the longest suffix which occurs: counts divided by their sum. What the gate looks at it has not
all: no number of documents (the count stands for it, at most 16), no discount, so that a token which never followed the
longest suffix gets nothing; and nothing can be deleted. All else (length, count, distinct, entropy, the order below)
is taken from its answers; the order below costs a second question.

    python run.py --data DATA --out OUT --only infini-gram --infini-gram-python PYTHON
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from perplexity import RETRIEVED_FOR_GENERAL, Perplexity

from engram_lm.adapt.report import perplexities
from engram_lm.mixing import onepass
from engram_lm.mixing.features import features
from engram_lm.mixing.lookups import Lookups, evidence
from engram_lm.mixing.mix import combine

SEPARATOR = 65_535
DOMAINS = (RETRIEVED_FOR_GENERAL,)


def measure_infini_gram(setting: Any, windows: int, python: Path, most: int | None) -> dict[str, Any]:
    run, rows, told = Perplexity(setting, windows, most), [], {}
    for name in DOMAINS:
        domain = setting.domains[name]
        of = [
            window
            for window in run.todo()
            if window.domain == name or (window.kind == "general" and name == RETRIEVED_FOR_GENERAL)
        ]
        of = [window for window in of if setting.read.path(window.ids, window.scored).exists()]
        directory = (setting.out / "peer" / name).resolve()
        if "table" in str(directory) or "tokenized" in str(directory):
            raise SystemExit(
                f'infini-gram cannot work below a path that holds "table" or "tokenized": {directory}'
            )
        told[name] = build(directory, [domain.documents[one] for one in domain.indexed], python)
        asked, answered = directory / "asked.npz", directory / "answered.npz"
        if not answered.exists():
            np.savez(asked, *[window.ids for window in of], given=[window.given for window in of])
            script = Path(__file__).parent / "peer_asked.py"
            subprocess.run([python, script, directory, asked, answered], check=True, stdout=sys.stderr)
        found = np.load(answered)
        told[name] |= {"ms a position": float(found["ms"]), "positions": int(found["positions"])}
        for n, window in enumerate(of):
            rows.append(
                scored(setting, window, found[f"integers_{n}"], found[f"numbers_{n}"], f"{name} all", domain)
            )
    return {"groups": perplexities(rows), "indexes": told}


def build(directory: Path, documents: list[np.ndarray], python: Path) -> dict[str, Any]:
    """Its own indexing of the same tokens."""
    (directory / "data").mkdir(parents=True, exist_ok=True)
    place_D = np.cumsum([0, *(len(ids) + 1 for ids in documents)])
    stream = np.concatenate([np.append(np.uint16(SEPARATOR), ids.astype(np.uint16)) for ids in documents])
    about = directory / "built.json"
    if not about.exists():
        stream.tofile(directory / "tokenized.0")
        place = place_D[:-1] * 2
        place.astype(np.uint64).tofile(directory / "offset.0")
        (directory / "table.0").unlink(missing_ok=True)
        begun = time.perf_counter()
        done = subprocess.run(
            [
                python, "-m", "infini_gram.indexing", "--data_dir", directory / "data", "--save_dir", directory,
                "--token_dtype", "u16", "--cpus", "1", "--mem", "1", "--ulimit", "1024",
            ],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"infini-gram's indexing failed: {done.stderr[-500:]}")
        size = sum((directory / f"{part}.0").stat().st_size for part in ("tokenized", "table", "offset"))
        about.write_text(
            json.dumps(
                {"tokens": len(stream), "seconds": round(time.perf_counter() - begun, 2), "bytes": size}
            )
        )
    return json.loads(about.read_text())


def scored(
    setting: Any, window: Any, integers_T: np.ndarray, numbers_T: np.ndarray, index: str, domain: Any
) -> dict[str, Any]:
    """A row as of `adapt.arms`. integers [T, 6], numbers [T, 3]: see peer_asked.py."""
    depth, count, distinct, count_below, distinct_below, top = integers_T.T
    p, top_p, entropy = numbers_T.T
    muted = setting.rules.mute(window.ids[window.given :])
    memory = Lookups(
        depth=depth, count=count, distinct=distinct, count_below=count_below, distinct_below=distinct_below,
        documents=np.minimum(count, 16), entropy=entropy, top=np.where(setting.rules.mute(top), -1, top), top_p=top_p,
        p=np.where(muted, 0.0, p),
    )  # fmt: skip
    logits_TV, seconds = setting.read(window.ids, window.scored)
    survey_T6 = np.empty((window.scored, 6))
    onepass.survey_rows(logits_TV, window.ids[window.given :], memory.top, survey_T6)
    lam = setting.gate.lambdas(features(evidence(memory, survey_T6), tokens=domain.snapshots["all"].n_tokens))
    log_p, _ = combine(survey_T6[:, 0], memory.p, np.where(count > 0, lam, 0.0))
    return {
        "arm": "infini-gram", "index": index, "window": window.key, "kind": window.kind, "domain": window.domain,
        "tokens": window.scored, "log_p": float(log_p.sum()), "log_p_alone": float(survey_T6[:, 0].sum()),
        "mean_lambda": float(lam.mean()), "prompt_tokens": 0, "model_seconds": seconds, "memory_seconds": 0.0,
    }  # fmt: skip
