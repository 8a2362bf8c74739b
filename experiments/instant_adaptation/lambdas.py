"""How far memory is believed: by how often the model may have seen a wording, and on arithmetic (part of run.py).

What SmolLM2 was trained on is not at hand. In its place stands the number of times that a token, and the trigram it ends,
occur in 12,000 articles of an encyclopaedia of 2014 (part of the data, in no index here). Deciles are of the positions of
all windows of a kind; where many have one frequency, deciles fall together.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
from gate_texts import documents
from perplexity import Perplexity

from engram_lm.adapt.arms import Arms
from engram_lm.mixing.scoring import log_p_of

TRAINING, ARTICLES = "corpora/enwiki2014-train-00.jsonl.xz", 12_000


class Frequencies:
    """How often tokens and trigrams occur in a sample of the training text."""

    def __init__(self, setting: Any) -> None:
        texts = [text for _, text in documents(setting.data / TRAINING, ARTICLES)]
        lists = setting.encoder.encode_all(texts)
        self.tokens = sum(map(len, lists))
        self.count_V = np.zeros(setting.encoder.vocab_size, np.int64)
        keys = []
        for ids in lists:
            self.count_V += np.bincount(ids, minlength=len(self.count_V))
            keys.append(_trigrams(ids.astype(np.uint64)))
        self.key_K, self.count_K = np.unique(np.concatenate(keys), return_counts=True)

    def of(self, ids: np.ndarray, last: int) -> tuple[np.ndarray, np.ndarray]:
        """(token's, trigram's) frequency of the last tokens of ids."""
        key_T = _trigrams(ids.astype(np.uint64))[-last:]
        at_T = np.minimum(np.searchsorted(self.key_K, key_T), len(self.key_K) - 1)
        return self.count_V[ids[-last:]], np.where(self.key_K[at_T] == key_T, self.count_K[at_T], 0)


def _trigrams(ids: np.ndarray) -> np.ndarray:
    return (ids[:-2] << np.uint64(32)) | (ids[1:-1] << np.uint64(16)) | ids[2:]


def measure_lambdas(setting: Any, windows: int, most: int | None) -> dict[str, Any]:
    frequencies, run = Frequencies(setting), Perplexity(setting, windows, most)
    kinds: dict[str, list[tuple[np.ndarray, ...]]] = {}
    for window in run.todo():
        if not setting.read.path(window.ids, window.scored).exists():
            continue
        logits_TV, _ = setting.read(window.ids, window.scored)
        names = [window.domain] if window.domain in setting.domains else list(setting.domains)
        for name in names:
            snapshot = setting.domains[name].snapshots["all"]
            log_p, lam, _ = run.arms.mixed(window.ids, logits_TV, snapshot, setting.gate)
            gain = log_p - log_p_of(logits_TV, window.ids[window.given :])
            kinds.setdefault(window.kind, []).append((*frequencies.of(window.ids, window.scored), lam, gain))
    tables = {}
    for kind, parts in kinds.items():
        token_N, trigram_N, lam_N, gain_N = (np.concatenate(column) for column in zip(*parts, strict=True))
        tables[kind] = {
            "token": deciles(token_N, lam_N, gain_N),
            "trigram": deciles(trigram_N, lam_N, gain_N),
            "positions": len(lam_N),
        }
    sample = {"file": Path(TRAINING).name, "articles": ARTICLES, "tokens": frequencies.tokens}
    return {"training sample": sample, "by frequency": tables, "arithmetic": arithmetic(setting)}


def deciles(frequency_N: np.ndarray, lam_N: np.ndarray, gain_N: np.ndarray) -> list[dict[str, Any]]:
    edges = np.unique(np.quantile(frequency_N, np.linspace(0, 1, 11), method="lower"))
    at_N = np.searchsorted(edges, frequency_N, "right") - 1
    at_N = np.minimum(at_N, max(len(edges) - 2, 0))
    return [
        {
            "from": int(frequency_N[here].min()), "to": int(frequency_N[here].max()), "positions": int(here.sum()),
            "mean lambda": float(lam_N[here].mean()), "mean gain, nats": float(gain_N[here].mean()),
        }
        for k in range(len(edges))
        if (here := at_N == k).any()
    ]  # fmt: skip


def arithmetic(setting: Any) -> dict[str, Any]:
    """Mean lambda at the tokens of the answers, beside every index."""
    draw, texts = random.Random(0), []
    for form, n in (
        ("{a} + {b} = {c}", 30),
        ("{a} - {b} = {d}", 15),
        ("{a} * {b} = {e}", 15),
        ("What is {a} plus {b}? It is {c}", 15),
    ):
        for _ in range(n):
            a, b = draw.randrange(11, 99), draw.randrange(2, 10 if "*" in form else 90)
            a, b = max(a, b), min(a, b)
            texts.append(form.format(a=a, b=b, c=a + b, d=a - b, e=a * b))
    arms = Arms(setting.read, setting.encoder, setting.rules, setting.gate)
    readings = []
    for text in texts:
        head, answer = text.rsplit(" ", 1)
        ids = setting.encoder.encode(text)
        readings.append((ids, len(ids) - len(setting.encoder.encode(head))))
        assert setting.encoder.decode(ids[-readings[-1][1] :]).strip() == answer
    setting.read.prepare(readings)
    found = {}
    for name, domain in setting.domains.items():
        lams, gains = [], []
        for ids, last in readings:
            logits_TV, _ = setting.read(ids, last)
            log_p, lam, _ = arms.mixed(ids, logits_TV, domain.snapshots["all"], setting.gate)
            lams.append(lam)
            gains.append(log_p - log_p_of(logits_TV, ids[-last:]))
        lam_N = np.concatenate(lams)
        found[name] = {
            "prompts": len(texts), "tokens": len(lam_N), "mean lambda": float(lam_N.mean()), "largest": float(lam_N.max()),
            "mean gain, nats": float(np.concatenate(gains).mean()),
        }  # fmt: skip
    return found
