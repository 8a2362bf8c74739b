"""Train the demo's memory: SmolLM2-135M frozen, two Engram layers, encyclopaedia text, on a CPU.

    python experiments/demo_memory/train.py --data enwiki2014-train-00.jsonl.xz --out runs/demo --tokens 400000

A plain loop over the library (attach, any torch optimizer, save_memory), one pass in file order, constant memory, a
checkpoint every few minutes from which the same command goes on. Writes log.jsonl with loss and tokens a step.
"""

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import torch

from engram_lm.attachment import attach, memories
from engram_lm.config import MemoryConfig
from engram_lm.train.base import load_base

# 2 layers x 8 columns x about 29,000 rows x 32 numbers: 30 MB in bfloat16
CONFIG = MemoryConfig(layers=(1, 8), name="encyclopaedia", heads=4, rows_per_head=29_000, head_width=32)


def token_stream(path: Path, tokenizer, n_tokens: int) -> torch.Tensor:
    ids: list[int] = []
    with lzma.open(path, "rt", encoding="utf8") as lines:
        for line in lines:
            ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
            if len(ids) >= n_tokens:
                break
    return torch.tensor(ids[:n_tokens])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this long; the schedule ends with it")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, tokenizer, _ = load_base("smollm2")
    model.requires_grad_(False)
    model.config.use_cache = False
    attach(model, tokenizer, CONFIG)
    memory = memories(model)[CONFIG.name]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    checkpoint = options.out / "checkpoint.pt"
    step, spent, saved = 0, 0.0, 0.0
    if checkpoint.exists():
        held = torch.load(checkpoint)
        memory.slots.load_state_dict(held["slots"])
        for table, tensors, updates in zip(memory.tables, held["tables"], held["updates"], strict=True):
            table.restore(tensors)
            table.gradients.set_updates(updates)
        optimizer.load_state_dict(held["optimizer"])
        step, spent = held["step"], held["spent"]
        saved = spent

    def save() -> None:
        held = {
            "slots": memory.slots.state_dict(),
            "tables": [table.checkpoint() for table in memory.tables],
            "updates": [table.gradients.updates for table in memory.tables],
            "optimizer": optimizer.state_dict(),
            "step": step,
            "spent": spent,
        }
        torch.save(held, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").rename(checkpoint)

    ids = token_stream(options.data, tokenizer, options.tokens)
    size = options.batch * options.length
    with open(options.out / "log.jsonl", "a") as log:
        while (step + 1) * size <= len(ids) and spent < options.minutes * 60:
            begun = time.monotonic()
            done = max(spent / (options.minutes * 60), (step * size) / len(ids))
            warm = min(1.0, (step + 1) / 10)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
            batch = ids[step * size : (step + 1) * size].view(options.batch, options.length)
            loss = model(batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            spent += time.monotonic() - begun
            record = {"step": step, "tokens": step * size, "loss": round(loss.item(), 4)}
            record |= {"norm": round(float(norm), 4), "seconds": round(spent, 1)}
            log.write(json.dumps(record) + "\n")
            log.flush()
            print(record, flush=True)
            if spent - saved > 240:
                save()
                saved = spent
    save()


if __name__ == "__main__":
    main()
