"""What the settings of ask.py cost on text that has nothing to do with the handbook: perplexity with memory over alone.

Each window of 512 tokens is a request: its first 64 tokens are the prompt, which documents are chosen for and which memory
may be restricted by, as for a question; the rest is scored.

    measure(asker, Path("openstax-ccby.jsonl.xz"), Path("harm.json"), windows=12)
"""

import json
import lzma
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram_lm.mixing import FixedLambda
from engram_lm.mixing.lookups import read_text
from engram_lm.mixing.pointing import COVERAGE, Pointing, point
from engram_lm.mixing.scoring import score_text

WINDOW, PROMPT_TOKENS = 512, 64


def windows_of(path: Path, tokenizer: Any, n: int) -> list[list[int]]:
    """The window behind the first 300 characters of every fortieth document that is long enough."""
    found = []
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf8") as file:
        for number, line in enumerate(file):
            if number % 40 or len(found) == n:
                continue
            ids = tokenizer(json.loads(line)["text"][300:6000], add_special_tokens=False).input_ids
            if len(ids) >= WINDOW:
                found.append(ids[:WINDOW])
    return found


@torch.inference_mode()
def measure(asker: Any, text: Path, out: Path, *, windows: int = 12) -> dict[str, Any]:
    gates = {"gate": asker.gate, "believing gate": replace(asker.gate, shift=asker.gate.shift - 3.0)}
    gates |= {f"λ {lam}": FixedLambda(lam) for lam in (0.3, 0.5, 0.9)}
    sums: dict[str, list[float]] = {}
    alone, tokens = 0.0, 0
    for ids in windows_of(text, asker.tokenizer, windows):
        logits_TV = asker.model(torch.tensor([ids])).logits[0].numpy()
        log_z_T = np.logaddexp.reduce(logits_TV.astype(np.float64), axis=1)
        target = np.array(ids[PROMPT_TOKENS:])
        rows = np.arange(PROMPT_TOKENS - 1, WINDOW - 1)
        log_p_T = logits_TV[rows, target].astype(np.float64) - log_z_T[rows]
        alone, tokens = alone + log_p_T.sum(), tokens + len(target)
        prompt = asker.tokenizer.decode(ids[:PROMPT_TOKENS])
        for shelf in asker.shelves.values():
            memories = {"whole": shelf.snapshot}
            chosen = shelf.chooser.chosen(prompt, 3)
            if chosen:
                memories["top 1"] = shelf.snapshot.restricted([chosen[0].id])
                memories["top 3"] = shelf.snapshot.restricted([one.id for one in chosen])
            for where, snapshot in {"top 1": shelf.snapshot, "top 3": shelf.snapshot, **memories}.items():
                for name, gate in gates.items():
                    memory = read_text(snapshot, np.array(ids), asker.rules, gate.reading)
                    scored = score_text(
                        np.array(ids),
                        logits_TV,
                        memory,
                        snapshot,
                        gate,
                        rules=asker.rules,
                        given=PROMPT_TOKENS,
                    )
                    add(sums, f"{shelf.size}: {where}, {name}", scored["log_p"][PROMPT_TOKENS - 1 :].sum())
            focus = shelf.chooser.focus(prompt, [one.id for one in chosen]) if chosen else ()
            known = focus if chosen and chosen[0].coverage >= COVERAGE else ()
            for arm, sentences in (("top 3, pointing", known), ("top 3, pointing always", focus)):
                total = 0.0
                for t, (row, token) in enumerate(zip(rows, target, strict=True)):
                    total += pointed(
                        sentences, ids[PROMPT_TOKENS : PROMPT_TOKENS + t], logits_TV[row], log_z_T[row], token
                    )
                add(sums, f"{shelf.size}: {arm}", total)
    found = {
        "text": text.name, "tokens": tokens, "perplexity_alone": math.exp(-alone / tokens),
        "arms": {arm: math.exp((alone - total) / tokens) - 1 for arm, (total,) in sums.items()},
    }  # fmt: skip
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    return found


def pointed(focus: tuple, said: list[int], logits_V: np.ndarray, log_z: float, token: int) -> float:
    """log P of a token with pointing."""
    p_model = math.exp(float(logits_V[token]) - log_z)
    found = point(focus, said, logits_V, Pointing())
    p_memory = float(found.p[found.tokens == token].sum())
    return math.log((1 - found.lam) * p_model + found.lam * p_memory)


def add(sums: dict[str, list[float]], arm: str, value: float) -> None:
    sums.setdefault(arm, [0.0])[0] += float(value)
