"""A LoRA fine-tune on equal data: ten pages of the handbook and the factbook's asked documents (part of run.py).

Rank 8 on the four projections of attention (peft), AdamW, three passes over sequences of 256 tokens, batch 1. It is compared
with memory of the same ten pages, and of the same documents. All pages would take hours on this machine, which is stated.
"""

import resource
import time
from typing import Any

import numpy as np
import torch
from facts import WORDINGS, read_facts, texts_of
from perplexity import Perplexity

from engram_lm.adapt.arms import ModelReader, log_p_of
from engram_lm.adapt.kept import Kept
from engram_lm.adapt.report import mean_interval, perplexities
from engram_lm.train.base import load_base, quiet_libraries

PAGES, EPOCHS, LENGTH, RATE = 10, 3, 256, 1e-3


def measure_lora(setting: Any, windows: int) -> dict[str, Any]:
    handbook = setting.domains["handbook"]
    pages = handbook.indexed[:PAGES]
    facts = [
        fact for fact in read_facts(setting.data, texts_of(setting.data), 40) if fact.source == "factbook"
    ]
    texts = texts_of(setting.data)
    end = setting.tokenizer.eos_token_id
    lists = [handbook.documents[name] for name in pages] + [
        setting.encoder.encode(texts[fact.document]) for fact in facts
    ]
    stream = np.concatenate([np.append(ids.astype(np.int64), end) for ids in lists])
    model, told = tuned(setting, stream)
    read = ModelReader(model)
    kept = Kept(setting.out / "lora", {"tokens": len(stream), "epochs": EPOCHS, "rate": RATE})
    run = Perplexity(setting, windows)
    todo = [
        window
        for window in run.todo()
        if (window.domain == "handbook" and (window.kind == "unseen" or window.id in pages))
        or window.kind == "general"
    ]
    for window in todo:
        if kept.has("lora", window.key):
            continue
        logits_TV, seconds = read(window.ids, window.scored)
        alone_TV, _ = setting.read(window.ids, window.scored)
        target = window.ids[window.given :]
        kept.add({
            "arm": "lora", "index": f"handbook {PAGES}", "window": window.key, "kind": window.kind, "domain": window.domain,
            "tokens": window.scored, "log_p": float(log_p_of(logits_TV, target).sum()),
            "log_p_alone": float(log_p_of(alone_TV, target).sum()), "mean_lambda": 0.0, "prompt_tokens": 0,
            "model_seconds": round(seconds, 4), "memory_seconds": 0.0,
        }, key=window.key)  # fmt: skip
    keys = {window.key for window in todo}
    groups = perplexities(row for row in kept.rows("lora") if row["key"] in keys)
    return {"training": told, "groups": groups, "facts": asked(setting, read, facts)}


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
        "documents": PAGES, "tokens": len(stream), "epochs": EPOCHS, "steps": steps, "rate": RATE,
        "cpu_seconds": round(time.process_time() - cpu, 1), "seconds": round(time.perf_counter() - begun, 1),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "more_memory_MB": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
        "first_loss": float(np.mean(losses[:10])), "last_loss": float(np.mean(losses[-10:])),
    }  # fmt: skip
    model.save_pretrained(path)
    np.savez(about, **told)
    return model.merge_and_unload().eval(), told
