"""Throughput lost, and device memory gained, with a memory's rows in host memory instead of on the GPU. Needs a GPU.

    python benchmarks/offload_gpu.py                          # the largest table that host memory holds
    python benchmarks/offload_gpu.py --table-gib 30           # one that also fits on the GPU: all four arms
    python benchmarks/offload_gpu.py --quick                  # does it run at all, on the CPU; its numbers mean nothing

Models of Qwen3's 4B and 8B shapes, random bfloat16 weights made on the device, nothing downloaded. 512 requests of 100 to
1,024 tokens, drawn as `shape.draw_ids` draws "zipf" from 32,000 ids, sorted by length and served 64 at a time, padded on
the left: one prefill, then a token a step through a static cache, eager. Every step's chosen tokens are brought to the
host, as a server does; what goes on is drawn ids, because a random model repeats itself and would find its rows in cache.

Arms, which share the model's weights and take turns batch by batch, each first as often as last:

- "none": the model without memory, without hooks.
- "host": rows bfloat16 in host memory, on huge pages, every page written; gathered from the moment the ids are known.
- "host, no prefetch": the same rows, gathered when the layer is reached.
- "device": the same rows on the GPU, where they fit beside the model; otherwise null, with the reason.

Memory: profile "paper" (16 columns of 80 numbers) before two blocks. "lost" is the share of throughput lost, of the sums
over batches of the repeats' medians, the difference taken within a turn; its 95 % interval is a bootstrap of the repeats of
each batch. Against "none" it includes what the layer itself computes; host against "device" it is what the place of the
rows costs. Limits are stated, not enforced. The last line is JSON.
"""

import argparse
import contextlib
import copy
import gc
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import circumstances
from shape import draw_ids, tokenizer_of_words
from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache

from engram_lm import MemoryConfig, attach, memories, use_table
from engram_lm.addressing import PROFILES
from engram_lm.identity import BaseRef
from engram_lm.storage import HostStore
from engram_lm.tables import DeviceTable, ReadOnlyTable

GIB = 1 << 30
SEED = 0
BOOTSTRAP = 4_000
# what others lost: the paper 1.9 % (4B) and 2.8 % (8B), SGLang 0.07 %
AIM_LOST = 0.001
COMMON = {
    "vocab_size": 151_936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "max_position_embeddings": 40_960,
}  # fmt: skip
SHAPES = {
    "4B": {**COMMON, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "8B": {**COMMON, "hidden_size": 4096, "intermediate_size": 12_288, "tie_word_embeddings": False},
}
TINY = {
    **COMMON, "vocab_size": 32_000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how often."""

    models: dict[str, dict]
    device: str
    requests: int = 512
    least_tokens: int = 100
    most_tokens: int = 1_024
    batch: int = 64
    # tokens a request gets: the first by the prefill, the others one a step
    generated: int = 64
    repeats: int = 9
    blocks: tuple[int, ...] = (1, 15)
    # None: all that is available, less the margin
    table_bytes: int | None = None
    host_margin_bytes: int = 12 * GIB
    device_margin_bytes: int = 6 * GIB


QUICK = Settings(
    models={"tiny": TINY}, device="cpu", requests=6, least_tokens=5, most_tokens=24, batch=3, generated=4, repeats=2,
    blocks=(1, 2), table_bytes=16 << 20,
)  # fmt: skip


# ---- the model and its requests ---------------------------------------------------------------------------------------


def random_qwen3(shape, device):
    """A model of that shape: bfloat16 numbers from N(0, 0.02), drawn on the device."""
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
    finally:
        torch.set_default_dtype(before)


def twin_of(model):
    """Another model with the same weights, not copies of them."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


@dataclass(frozen=True)
class Batch:
    """Requests of like length, padded on the left; `next_BG` are the drawn ids that go on."""

    ids_BT: torch.Tensor
    # [B, T + G]: 0 where there is padding
    mask_BS: torch.Tensor
    place_BS: torch.Tensor
    next_BG: torch.Tensor
    # without padding
    n_prompt: int


def batches_of(settings):
    """All requests, shortest first."""
    lengths = np.random.default_rng(SEED).integers(
        settings.least_tokens, settings.most_tokens + 1, settings.requests
    )
    longest = settings.most_tokens + settings.generated
    (drawn,) = draw_ids("zipf", batch=settings.requests, tokens=longest, count=1)
    order, found = np.argsort(lengths, kind="stable"), []
    for start in range(0, settings.requests, settings.batch):
        members = order[start : start + settings.batch]
        n_chunk, n_new = int(lengths[members].max()), settings.generated
        ids_BT = torch.zeros((len(members), n_chunk), dtype=torch.int64)
        mask_BS = torch.ones((len(members), n_chunk + n_new), dtype=torch.int64)
        next_BG = torch.empty((len(members), n_new), dtype=torch.int64)
        for b, member in enumerate(members):
            length = int(lengths[member])
            ids_BT[b, n_chunk - length :] = drawn[member, :length]
            mask_BS[b, : n_chunk - length] = 0
            next_BG[b] = drawn[member, length : length + n_new]
        place_BS = (mask_BS.cumsum(1) - 1).clamp_min(0)
        tensors = (tensor.to(settings.device) for tensor in (ids_BT, mask_BS, place_BS, next_BG))
        found.append(Batch(*tensors, n_prompt=int(lengths[members].sum())))
    return found


@torch.inference_mode()
def serve(model, batch, *, generated):
    """(seconds of the prefill, seconds of the steps, chosen tokens int64 [B, G])."""
    n_chunk = batch.ids_BT.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=n_chunk + generated)
    _wait(batch.ids_BT)
    start, chosen = time.perf_counter(), []
    for step in range(generated):
        first, last = (n_chunk + step - 1, n_chunk + step) if step else (0, n_chunk)
        out = model(
            batch.next_BG[:, step - 1 : step] if step else batch.ids_BT,
            attention_mask=batch.mask_BS[:, :last],
            position_ids=batch.place_BS[:, first:last],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        # waits for the device
        chosen.append(out.logits[:, -1].argmax(-1).cpu())
        if step == 0:
            prefilled = time.perf_counter()
    return prefilled - start, time.perf_counter() - prefilled, torch.stack(chosen, 1)


def _wait(like):
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)


# ---- the tables -------------------------------------------------------------------------------------------------------


def available_bytes():
    """Host memory that this process can still have: the kernel's estimate, or less where a control group says so."""
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    root = Path("/sys/fs/cgroup")
    for folder, limit, used, cached in [
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ]:
        with contextlib.suppress(OSError, ValueError, KeyError):
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            most = int((folder / limit).read_text())  # "max": no limit
            free = min(free, most - int((folder / used).read_text()) + int(stat[cached]))
    return free


def memory_config(settings, n_bytes):
    """A memory whose tables together have about that many bytes."""
    profile = PROFILES["paper"]
    row_bytes = 2 * profile.head_width
    rows_per_head = n_bytes // (len(settings.blocks) * profile.columns * row_bytes)
    if rows_per_head < 1_000:
        raise SystemExit(f"{n_bytes / GIB:.3f} GiB are {rows_per_head} rows a head: too few for a table.")
    return MemoryConfig(layers=settings.blocks, rows_per_head=rows_per_head, row_dtype="bfloat16")


def pattern_of(width):
    """bfloat16 [65,536, width]: the rows that every table repeats."""
    return torch.randn((1 << 16, width), generator=torch.Generator().manual_seed(SEED)).to(torch.bfloat16)


def fill(rows_RW, pattern_PW):
    for start in range(0, len(rows_RW), len(pattern_PW)):
        part = rows_RW[start : start + len(pattern_PW)]
        part[:] = pattern_PW[: len(part)]


def host_store(slot):
    """Rows in host memory, every page of them written."""
    store = HostStore(
        name=f"block {slot.block}", n_rows=slot.table.n_rows, width=slot.table.width, codec="bf16"
    )
    fill(store.record_RB, pattern_of(slot.table.width).view(torch.uint8).numpy())
    return store


def device_tables(slots, device):
    """{block: rows on the device}, the same as on the host."""
    found = {}
    for slot in slots:
        table = DeviceTable(
            n_rows=slot.table.n_rows, width=slot.table.width, dtype=torch.bfloat16, device=device,
            name=f"block {slot.block} on {device}",
        )  # fmt: skip
        fill(table.rows_view(), pattern_of(slot.table.width).to(device))
        found[slot.block] = table
    return found


def use(model, tables):
    for block, table in tables.items():
        use_table(model, block, table)


# ---- measuring --------------------------------------------------------------------------------------------------------


def peak_bytes(run, device):
    """The most device memory that tensors had during `run`; None without a GPU."""
    if device == "cpu":
        return run() and None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def why_not_on_device(settings, *, rows_bytes, peak):
    """None where rows fit on the device beside all that the model needs; otherwise the reason."""
    if settings.device == "cpu":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - (peak - torch.cuda.memory_allocated())
    if rows_bytes + settings.device_margin_bytes <= free:
        return None
    return (
        f"{rows_bytes / GIB:.1f} GiB of rows and {settings.device_margin_bytes / GIB:.0f} GiB of margin, "
        f"{free / GIB:.1f} GiB free beside the model"
    )


def lost(base_RN, arm_RN):
    """Share of throughput lost, and its 95 % bootstrap interval, from seconds [repeat, batch] of two arms."""
    n_repeats, n_batches = base_RN.shape
    added_RN = arm_RN - base_RN

    def shares(pick_DRN):
        column_N = np.arange(n_batches)
        base_D = np.median(base_RN[pick_DRN, column_N], axis=1).sum(-1)
        added_D = np.median(added_RN[pick_DRN, column_N], axis=1).sum(-1)
        return added_D / (base_D + added_D)

    every = np.broadcast_to(np.arange(n_repeats)[None, :, None], (1, n_repeats, n_batches))
    drawn = np.random.default_rng(SEED).integers(0, n_repeats, (BOOTSTRAP, n_repeats, n_batches))
    low, high = np.percentile(shares(drawn), [2.5, 97.5])
    return {"share": float(shares(every)[0]), "low": float(low), "high": float(high), "repeats": n_repeats}


def take_turns(arms, batches, settings):
    """{arm: {"prefill", "steps": seconds [repeat, batch], "tokens": of the last repeat}}; the first round is not kept."""
    found = {name: {"prefill": [], "steps": [], "tokens": []} for name in arms}
    names = list(arms)
    for repeat in range(-1, settings.repeats):
        spent = {name: [] for name in names}
        for k, batch in enumerate(batches):
            turn = (repeat + k) % len(names)
            for name in names[turn:] + names[:turn]:
                spent[name].append(arms[name](batch))
        for name, rounds in spent.items():
            if repeat >= 0:
                found[name]["prefill"].append([prefill for prefill, _, _ in rounds])
                found[name]["steps"].append([steps for _, steps, _ in rounds])
            found[name]["tokens"] = [tokens for _, _, tokens in rounds]
    return found


def measure(name, settings, batches, stores, n_bytes):
    """One model: speed of every arm, what each lost, and device memory. `stores` are made once and kept for the next."""
    device, longest = settings.device, batches[-1]
    bare = random_qwen3(settings.models[name], device)

    def arm(model, tables):
        def run(batch):
            use(model, tables)
            return serve(model, batch, generated=settings.generated)

        return run

    arms = {"none": arm(bare, {})}
    peak = {"none": peak_bytes(lambda: arms["none"](longest), device)}
    # the fingerprint of random weights would be read back from the device for nothing
    base = BaseRef(name=f"qwen3-{name}", kind="scratch", sha256="0" * 64)
    model = attach(twin_of(bare), tokenizer_of_words(), memory_config(settings, n_bytes), base=base)
    slots = memories(model)["memory"].slots
    if not stores:
        stores.update({slot.block: host_store(slot) for slot in slots})
    rows_bytes = sum(store.n_rows * store.record_bytes for store in stores.values())
    host = {block: ReadOnlyTable(store, dtype=torch.bfloat16) for block, store in stores.items()}
    waiting = {block: ReadOnlyTable(store, dtype=torch.bfloat16) for block, store in stores.items()}
    for table in waiting.values():
        table.fetches_ahead = False
    arms |= {"host": arm(model, host), "host, no prefetch": arm(model, waiting)}
    peak["host"] = peak_bytes(lambda: arms["host"](longest), device)
    missing = why_not_on_device(settings, rows_bytes=rows_bytes, peak=peak["host"])
    if missing is None:
        arms["device"] = arm(model, device_tables(slots, device))
        peak["device"] = peak_bytes(lambda: arms["device"](longest), device)
    for table in host.values():
        table.waited_s, table.tickets_read = 0.0, 0
    found = take_turns(arms, batches, settings)
    report = reported(found, batches, settings)
    report |= {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in bare.parameters()),
        "rows": {"bytes": rows_bytes, "rows": sum(store.n_rows for store in stores.values())},
        "without_device_arm": missing,
        "waited_s_a_forward": sum(t.waited_s for t in host.values())
        / max(1, *(t.tickets_read for t in host.values())),
        "device_memory": {
            "peak_bytes": peak,
            "gained_bytes": peak["device"] - peak["host"] if peak.get("device") else None,
            # where the rows do not fit on the device: what they would take there
            "rows_not_on_device_bytes": rows_bytes,
        },
    }
    return report


def reported(found, batches, settings):
    """Tokens a second of every arm, and the shares lost, in all and by phase."""
    n_prompt = sum(batch.n_prompt for batch in batches)
    n_tokens = n_prompt + settings.generated * settings.requests
    phases = {
        name: {
            "all": np.array(times["prefill"]) + np.array(times["steps"]),
            "prefill": np.array(times["prefill"]),
            "steps": np.array(times["steps"]),
        }
        for name, times in found.items()
    }
    speed = {}
    for name, phase in phases.items():
        rate_R = n_tokens / phase["all"].sum(1)
        speed[name] = {
            "median_tokens_a_s": float(np.median(rate_R)), "min": float(rate_R.min()), "max": float(rate_R.max()),
            "median_prefill_s": float(np.median(phase["prefill"].sum(1))),
            "median_steps_s": float(np.median(phase["steps"].sum(1))),
        }  # fmt: skip
    pairs = [(base, arm) for base in ("none", "device") for arm in phases if base in phases and arm != base]
    shares = {
        f"{arm} against {base}": {
            phase: lost(phases[base][phase], phases[arm][phase]) for phase in phases[arm]
        }
        for base, arm in pairs
        if arm != "none"
    }
    memory_arms = [name for name in found if name != "none"]
    same = {
        name: all(
            torch.equal(a, b) for a, b in zip(found[name]["tokens"], found["host"]["tokens"], strict=True)
        )
        for name in memory_arms
    }
    return {
        "prompt_tokens": n_prompt,
        "tokens": n_tokens,
        "speed": speed,
        "lost": shares,
        "aim_lost_at_most": AIM_LOST,
        "aim_met": {name: share["all"]["high"] <= AIM_LOST for name, share in shares.items()},
        # the place of the rows must change no token; memory itself must
        "same_tokens_as_host": same,
        "same_tokens_as_none": all(
            torch.equal(a, b) for a, b in zip(found["none"]["tokens"], found["host"]["tokens"], strict=True)
        ),
    }


def readable(report):
    gib = report["rows"]["bytes"] / GIB
    lines = [f"{report['model']}: {report['parameters'] / 1e9:.2f} B parameters, {gib:,.2f} GiB of rows"]
    for name, speed in report["speed"].items():
        lines.append(
            f"  {name:34}{speed['median_tokens_a_s']:12,.0f} tokens/s  ({speed['min']:,.0f} to {speed['max']:,.0f})"
        )
    for name, share in report["lost"].items():
        every = share["all"]
        lines.append(
            f"  {name:34}{100 * every['share']:+11.2f} % lost  ({100 * every['low']:+.2f} to {100 * every['high']:+.2f})"
        )
    gained = report["device_memory"]["gained_bytes"]
    if gained is not None:
        lines.append(f"  {'device memory gained':34}{gained / GIB:12,.2f} GiB")
    if report["without_device_arm"]:
        lines.append(f"  no arm with rows on the device: {report['without_device_arm']}")
    return "\n".join(lines)


def process_memory():
    """Resident and huge-page bytes of this process; zeros of huge pages mean that the system gave none."""
    with contextlib.suppress(OSError), open("/proc/self/smaps_rollup") as lines:
        found = {line.split(":")[0]: line.split()[1] for line in lines if line.rstrip().endswith("kB")}
        return {
            "resident_bytes": int(found["Rss"]) << 10,
            "huge_page_bytes": int(found["AnonHugePages"]) << 10,
        }
    return None


def gpu(device):
    if device == "cpu":
        return None
    about = torch.cuda.get_device_properties(device)
    return {"name": about.name, "memory_bytes": about.total_memory, "cuda": torch.version.cuda}


def run(settings):
    batches, stores, available = batches_of(settings), {}, available_bytes()
    n_bytes = settings.table_bytes or available - settings.host_margin_bytes
    if n_bytes > available - settings.host_margin_bytes and settings.device != "cpu":
        raise SystemExit(
            f"{n_bytes / GIB:.1f} GiB of rows do not fit: {available / GIB:.1f} GiB of host memory are available, and "
            f"{settings.host_margin_bytes / GIB:.0f} GiB stay free."
        )
    found = {
        "settings": {
            "requests": settings.requests, "request_tokens": [settings.least_tokens, settings.most_tokens],
            "batch": settings.batch, "generated": settings.generated, "blocks": settings.blocks, "seed": SEED,
            "draw": "zipf", "profile": "paper", "dtype": "bfloat16", "torch_threads": torch.get_num_threads(),
            "host_available_bytes": available, "host_margin_bytes": settings.host_margin_bytes,
            "shapes": settings.models,
        },
        "models": [],
    }  # fmt: skip
    for name in settings.models:
        found["models"].append(measure(name, settings, batches, stores, n_bytes))
        print(readable(found["models"][-1]), flush=True)
        gc.collect()
        if settings.device != "cpu":
            torch.cuda.empty_cache()
    return {**found, "process_memory": process_memory()}


def settings_from(options):
    if options.quick:
        torch.set_num_threads(1)
        return QUICK
    if not torch.cuda.is_available():
        raise SystemExit("offload_gpu.py needs a CUDA GPU and found none; --quick runs it on the CPU.")
    table_bytes = None if options.table_gib is None else int(options.table_gib * GIB)
    return Settings(
        models={name: SHAPES[name] for name in options.models}, device="cuda", batch=options.batch,
        generated=options.generated, repeats=options.repeats, blocks=tuple(options.blocks), table_bytes=table_bytes,
        host_margin_bytes=int(options.host_margin_gib * GIB),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and table on the CPU")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--table-gib", type=float, help="GiB of rows; default: all that fits host memory")
    parser.add_argument("--host-margin-gib", type=float, default=Settings.host_margin_bytes / GIB)
    parser.add_argument("--blocks", type=int, nargs="+", default=list(Settings.blocks))
    parser.add_argument("--batch", type=int, default=Settings.batch)
    parser.add_argument("--generated", type=int, default=Settings.generated, help="tokens a request")
    parser.add_argument("--repeats", type=int, default=Settings.repeats)
    settings = settings_from(parser.parse_args())
    about = circumstances("engram-lm", "torch", "transformers", "numpy", "numba")
    found = {"benchmark": "offload_gpu", **about, "gpu": gpu(settings.device), **run(settings)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
