"""Train the demo's memory: SmolLM2-135M frozen, two Engram layers, some hundred short encyclopaedia articles, on a CPU.

    python experiments/demo_memory/train.py --data DATA --out runs/demo --articles 400 --minutes 60

DATA holds corpora/enwiki2014-train-00.jsonl.xz and probes/enwiki2014_probes.jsonl.xz. A plain loop over the library
(attach, any torch optimizer, save_memory); a checkpoint every few minutes, from which the same command goes on.
Writes log.jsonl and, at the end, OUT/memory. The articles are read several times over: with this little computing time
a memory can learn a few articles well or many not at all.
"""

import argparse
import ctypes
import json
import math
import shutil
import time
from pathlib import Path

import torch
from articles import lines_of, short_articles, write_attribution

from engram_lm import MemoryConfig, attach, load_base, memories, save_memory

# 2 layers x 8 columns x about 29,000 rows x 32 numbers: 30 MB in bfloat16
CONFIG = MemoryConfig(layers=(1, 8), name="encyclopaedia", heads=4, rows_per_head=29_000, head_width=32)


def keep_freed_memory() -> None:
    """malloc returns large blocks to the kernel at once, and faulting them in again was a third of the time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def blocks_of(articles: list[dict], tokenizer, length: int) -> torch.Tensor:
    ids: list[int] = []
    for article in articles:
        ids += [*tokenizer(article["text"])["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--articles", type=int, default=400)
    parser.add_argument("--minutes", type=float, default=60.0, help="of training; the schedule ends with it")
    parser.add_argument(
        "--mixed-minutes",
        type=float,
        default=0.0,
        help="then as long with half of each batch from other articles, each read once: where the gates learn to close",
    )
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    model, tokenizer, base = load_base("smollm2")
    model.requires_grad_(False)
    model.config.use_cache = False
    attach(model, tokenizer, CONFIG, base=base)
    memory = memories(model)[CONFIG.name]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    facts = {p["id"] for p in lines_of(options.data / "probes/enwiki2014_probes.jsonl.xz")}
    articles = short_articles(
        options.data / "corpora/enwiki2014-train-00.jsonl.xz", options.articles, ids=facts
    )
    blocks = blocks_of(articles, tokenizer, options.length)
    checkpoint = options.out / "checkpoint.pt"
    step, spent, saved = 0, 0.0, 0.0
    if checkpoint.exists():
        held = torch.load(checkpoint)
        memory.slots.load_state_dict(held["slots"])
        for table, tensors, updates in zip(memory.tables, held["tables"], held["updates"], strict=True):
            table.restore(tensors)
            table.gradients.set_updates(updates)
        optimizer.load_state_dict(held["optimizer"])
        step, spent, saved = held["step"], held["spent"], held["spent"]

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

    a_pass = len(blocks) // options.batch
    print(f"{len(articles)} articles, {blocks.numel():,} tokens, {a_pass} steps a pass", flush=True)
    others = short_articles(
        options.data / "corpora/enwiki2014-rest.jsonl.xz", 2000 if options.mixed_minutes else 1
    )
    other_blocks = iter(
        blocks_of(others, tokenizer, options.length).split(options.batch - options.batch // 2)
    )
    with open(options.out / "log.jsonl", "a") as log:
        while spent < (options.minutes + options.mixed_minutes) * 60:
            begun = time.monotonic()
            order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(step // a_pass))
            batch = blocks[order[step % a_pass * options.batch :][: options.batch]]
            mixed = spent >= options.minutes * 60
            if mixed:
                batch = torch.cat([batch[: options.batch // 2], next(other_blocks)])
            length = options.mixed_minutes if mixed else options.minutes
            done = (spent / 60 - options.minutes * mixed) / length
            warm = 0.4 if mixed else min(1.0, (step + 1) / 20)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * warm * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
            optimizer.zero_grad()
            loss = model(batch, labels=batch).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            spent += time.monotonic() - begun
            record = {
                "step": step,
                "pass": round(step / a_pass, 2),
                "mixed": mixed,
                "loss": round(loss.item(), 4),
            }
            record |= {"norm": round(float(norm), 4), "seconds": round(spent, 1)}
            log.write(json.dumps(record) + "\n")
            log.flush()
            print(record, flush=True)
            if spent - saved > 240:
                save()
                saved = spent
    save()
    directory = save_memory(model, options.out / "memory", row_dtype=torch.bfloat16)
    write_attribution(directory / "ATTRIBUTION.md", articles)
    shutil.copy(options.out / "log.jsonl", directory)


if __name__ == "__main__":
    main()
