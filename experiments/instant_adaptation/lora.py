"""A LoRA fine-tune beside memory of equal data (part of run.py).

Equal data: ten excerpts of 320 tokens of ten pages of the handbook, and the documents of 40 facts of the factbook. That is
little because a machine of this kind trains some 100 tokens a second; memory has them in milliseconds. Rank 8 on the four
projections of attention (peft), AdamW, four passes over sequences of 256 tokens, batch 1.
"""

import resource
import time
from typing import Any

import numpy as np
import torch
from facts import WORDINGS, read_facts, texts_of
from perplexity import Perplexity

from engram_lm.adapt.arms import Arms, TimedReader
from engram_lm.adapt.kept import ResultRows
from engram_lm.adapt.report import perplexities
from engram_lm.bases.base import load_base, quiet_libraries
from engram_lm.eval.intervals import mean_interval
from engram_lm.index.segment import Document, Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot
from engram_lm.mixing.scoring import log_p_of

EXCERPTS, EPOCHS, LENGTH, RATE = 10, 4, 256, 1e-3
EQUAL = "equal data"


def measure_lora(setting: Any, windows: int, most: int | None = None) -> dict[str, Any]:
    run = Perplexity(setting, windows, most)
    facts = [
        fact for fact in read_facts(setting.data, texts_of(setting.data), 40) if fact.source == "factbook"
    ]
    texts = texts_of(setting.data)
    excerpts = run.windows["handbook"].indexed[:EXCERPTS]
    documents = {window.id: window.ids for window in excerpts}
    documents |= {fact.document: setting.encoder.encode(texts[fact.document]) for fact in facts}
    segment = Segment.build(
        list(documents.values()), vocab_size=setting.encoder.vocab_size,
        documents=[Document(id=name) for name in documents],
    )  # fmt: skip
    memory = Snapshot([LiveSegment(segment)], vocab_size=setting.encoder.vocab_size)
    end = setting.tokenizer.eos_token_id
    model, told = tuned(setting, np.concatenate([np.append(ids, end) for ids in documents.values()]))
    read, arms = (
        TimedReader(model, setting.tokenizer),
        Arms(setting.read, setting.encoder, setting.rules, setting.gate),
    )
    kept = ResultRows(setting.out / "lora", {"tokens": told["tokens"], "epochs": EPOCHS, "rate": RATE})
    others = [
        window
        for window in run.todo()
        if window.kind == "general" or (window.domain == "handbook" and window.kind == "unseen")
    ]
    rows = []
    for window in [*excerpts, *others]:
        if not kept.has("lora", window.key):
            logits_TV, seconds = read(window.ids, window.scored)
            log_p = log_p_of(logits_TV, window.ids[window.given :]).sum()
            kept.add(
                {"arm": "lora", "log_p": float(log_p), "model_seconds": round(seconds, 4)}, key=window.key
            )
        alone_TV, seconds = setting.read(window.ids, window.scored)
        mixed, lam, spent = arms.mixed(window.ids, alone_TV, memory, setting.gate)
        tuned_row = next(row for row in kept.rows("lora") if row["key"] == window.key)
        same = {
            "index": EQUAL, "window": window.key, "kind": window.kind, "domain": window.domain, "tokens": window.scored,
            "log_p_alone": float(log_p_of(alone_TV, window.ids[window.given :]).sum()), "prompt_tokens": 0,
        }  # fmt: skip
        rows.append({**tuned_row, **same, "mean_lambda": 0.0, "memory_seconds": 0.0})
        rows.append({
            **same, "arm": "memory", "log_p": float(mixed.sum()), "mean_lambda": float(lam.mean()),
            "model_seconds": round(seconds, 4), "memory_seconds": round(spent, 5),
        })  # fmt: skip
    return {"training": told, "groups": perplexities(rows), "facts": asked(setting, read, facts)}


def asked(setting: Any, read: Any, facts: list[Any]) -> list[dict[str, Any]]:
    found = []
    for wording in WORDINGS:
        right = []
        for fact in facts:
            prompt, answer = (
                setting.encoder.encode(fact.asked(wording)),
                setting.encoder.encode(f" {fact.answer}"),
            )
            logits_TV, _ = read(np.concatenate([prompt, answer]), len(answer))
            right.append(bool((logits_TV.argmax(1) == answer).all()))
        share, ends = mean_interval(right)
        about = {"arm": "lora", "source": "factbook", "wording": wording, "facts": len(right)}
        found.append({**about, "share": share, "interval": ends})
    return found


def tuned(setting: Any, stream: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """The adapted model, trained or read back, and what training took."""
    from peft import LoraConfig, PeftModel, get_peft_model

    path = setting.out / "lora" / "adapter"
    about = path / "training.npz"
    model = load_base("smollm2", report=lambda line: None).model
    if about.exists():
        with quiet_libraries():
            model = PeftModel.from_pretrained(model, path)
        told = {name: value.item() for name, value in np.load(about).items()}
        return model.merge_and_unload().eval(), told
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with quiet_libraries():
        model = get_peft_model(model, LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
        ))  # fmt: skip
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    pieces = [stream[at : at + LENGTH] for at in range(0, len(stream) - 1, LENGTH)]
    steps = EPOCHS * len(pieces)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    begun, cpu, losses = time.perf_counter(), time.process_time(), []
    model.train()
    random = np.random.default_rng(0)
    for _ in range(EPOCHS):
        for at in random.permutation(len(pieces)):
            ids = torch.as_tensor(pieces[at])[None]
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) % 20 == 0:
                print(
                    f"lora: step {len(losses)} of {steps}, loss {np.mean(losses[-20:]):.3f}",
                    flush=True,
                )
    told = {
        "excerpts": EXCERPTS, "tokens": len(stream), "epochs": EPOCHS, "steps": steps, "rate": RATE,
        "cpu_seconds": round(time.process_time() - cpu, 1), "seconds": round(time.perf_counter() - begun, 1),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "more_memory_MB": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
        "first_loss": float(np.mean(losses[:10])), "last_loss": float(np.mean(losses[-10:])),
    }  # fmt: skip
    model.save_pretrained(path)
    np.savez(about, **told)
    return model.merge_and_unload().eval(), told
