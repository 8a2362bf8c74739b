"""The texts that the default gate is fitted, bounded and checked on, and what the model alone makes of them.

    domains = corpora(data, tokenizer)           # documents that memories are made of
    plan = plan_texts(data, tokenizer, domains)  # Text: a window of ids, its domain, its role
    heads = read_model(model, plan, cache)       # last hidden state and a survey of the logits, kept in files

Roles: "fit" and "bound" make the gate; "check" is evaluation, and its files (handbook18f, wikitext2-valid) are used for
nothing else here. General text is scored against memories of other texts than its own. The philosophical prose among
the data is no general text here: it comes from the publisher of the textbooks and is found in them.
"""

import json
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WINDOW, LEAST = 512, 64
BOOKS = ("american-government", "anatomy-physiology", "business-law", "introduction-philosophy", "us-history")
ENCYCLOPAEDIA = "encyclopaedia"
HANDBOOK = "handbook"
FILES = {
    **dict.fromkeys(BOOKS, ("corpora/openstax-ccby.jsonl.xz", 60)),
    ENCYCLOPAEDIA: ("corpora/enwiki2014-train-00.jsonl.xz", 600),
    HANDBOOK: ("domain/handbook18f.jsonl.xz", None),
}


@dataclass(frozen=True)
class Text:
    """domain: "" for general text. id: of its document. role: fit, bound, check indexed, check unseen, check general."""

    ids: np.ndarray
    domain: str
    id: str
    role: str
    source: str


def corpora(data: Path, tokenizer) -> dict[str, dict[str, np.ndarray]]:
    """Token ids of documents by domain and document id."""
    return {
        name: {
            i: encode(tokenizer, text)
            for i, text in documents(data / path, limit, book=name if name in BOOKS else None)
        }
        for name, (path, limit) in FILES.items()
    }


def plan_texts(data: Path, tokenizer, domains: dict[str, dict[str, np.ndarray]]) -> list[Text]:
    """Every text that the model reads: one window of at most 512 tokens a document."""
    plan: list[Text] = []

    def add(ids: np.ndarray, domain: str, name: str, role: str, source: str) -> None:
        most = max(len(ids) - WINDOW, 0)
        start = int(np.random.default_rng(zlib.crc32(f"{source}/{name}".encode())).integers(0, most + 1))
        window = ids[start : start + WINDOW]
        if len(window) >= LEAST:
            plan.append(Text(window, domain, name, role, source))

    for domain, n in {**dict.fromkeys(BOOKS, 8), ENCYCLOPAEDIA: 24}.items():
        for name in chosen(domains[domain], n, seed=1):
            add(domains[domain][name], domain, name, "fit", Path(FILES[domain][0]).stem)
    with lzma.open(data / "corpora/tinyshakespeare.txt.xz", "rt", encoding="utf8") as file:
        plays = file.read()
    general = {
        "enwiki2014-train-01": documents(data / "corpora/enwiki2014-train-01.jsonl.xz", 48),
        "lambada_openai": documents(data / "probes/lambada_openai.jsonl.xz", 72),
        "tinyshakespeare": [(str(at), plays[at : at + 2000]) for at in range(0, 600_000, 50_000)],
    }
    for source, found in general.items():
        for n, (name, text) in enumerate(found):
            add(encode(tokenizer, text), "", name, ("fit", "bound")[n % 2], source)
    for role, names in zip(("check indexed", "check unseen"), halves(domains[HANDBOOK]), strict=True):
        for name in [name for name in names if len(domains[HANDBOOK][name]) >= 256][:20]:
            add(domains[HANDBOOK][name], HANDBOOK, name, role, "handbook18f")
    with lzma.open(data / "corpora/wikitext2-valid.txt.xz", "rt", encoding="utf8") as file:
        pages = file.read()
    for at in range(0, 1_000_000, 50_000):
        add(encode(tokenizer, pages[at : at + 2500]), "", str(at), "check general", "wikitext2-valid")
    return plan


def read_model(model, plan: list[Text], cache: Path) -> list[dict[str, np.ndarray]]:
    """For every text: hidden [T, D] float32 (before the output head) and survey [T - 1, 6] of its own tokens."""
    import torch

    from engram_lm.mixing import onepass

    cache.mkdir(parents=True, exist_ok=True)
    found = []
    for text in plan:
        path = cache / f"{zlib.crc32(text.ids.tobytes()):08x}.npz"
        if not path.exists():
            with torch.inference_mode():
                hidden_TD = model.model(torch.as_tensor(text.ids)[None], use_cache=False).last_hidden_state[0]
                logits_TV = model.lm_head(hidden_TD[:-1]).float().numpy()
            survey = np.empty((len(text.ids) - 1, 6))
            onepass.survey_rows(logits_TV, text.ids[1:], np.full(len(survey), -1), survey)
            np.savez(path, hidden=hidden_TD.numpy(), survey=survey)
        found.append(dict(np.load(path)))
    return found


def documents(path: Path, limit: int | None = None, book: str | None = None) -> list[tuple[str, str]]:
    """(id, text) of the first documents of a JSONL file, of one book where asked."""
    found: list[tuple[str, str]] = []
    with lzma.open(path, "rt", encoding="utf8") as file:
        for line in file:
            record = json.loads(line)
            if book is None or record.get("book") == book:
                found.append((str(record.get("id", len(found))), record.get("text") or record["context"]))
            if limit and len(found) == limit:
                break
    return found


def encode(tokenizer, text: str) -> np.ndarray:
    """Ids of a document; the names of special tokens in it stay plain text."""
    return np.array(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids, np.int64)


def chosen(documents: dict[str, np.ndarray], n: int, *, seed: int) -> list[str]:
    """n names at random; a smaller n is the beginning of a larger one."""
    names = list(documents)
    return [names[i] for i in np.random.default_rng(seed).permutation(len(names))[:n]]


def halves(documents: dict[str, np.ndarray]) -> tuple[list[str], list[str]]:
    """Names of the documents that are indexed and of those that are not."""
    names = chosen(documents, len(documents), seed=0)
    return names[: len(names) // 2], names[len(names) // 2 :]
