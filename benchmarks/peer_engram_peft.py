"""engram-peft 1.2.7 on a random Llama, timed against the bare model in the same run.

Run by a Python 3.12 that has engram-peft; it does not import engram_lm. Two to three minutes:

    python3.12 -m venv peer && peer/bin/pip install torch==2.13.0 engram-peft==1.2.7
    peer/bin/python benchmarks/peer_engram_peft.py --quick

What is timed: CPU seconds of this process (`time.process_time`) on one thread, medians over repeats after a
warm-up, bare and attached alternating so that both see the same machine. The ids are drawn, never one repeated id:
once from a Zipf law (as in text, some n-grams return) and once uniformly (hardly any does). The bare model's work does
not depend on the ids, so it is timed once, between the two.

How the peer is run, from its source, for its best time:

- Through `base_model`, as its own `generate` does: its hooks then hash the ids once. Its wrapper's `forward` hashes
  them a second time and drops the first result; `parts_s` holds what one hashing costs.
- Sparse embeddings (its default) and its own `get_optimizer`: SparseAdam for the rows at five times the rate of the
  Adam for all else.
- No telemetry, no shape checks (`ENGRAM_DEBUG_SHAPES` unset), fp32.
- One branch (`hc_mult=1`): on a model with one residual stream its default of four only adds work (`--branches 4`).
- Value projection and conv drawn from a normal instead of zero: the same work, and the memory's answer is not 0.

`layer_alone` times one of its memory layers without the model around it: added times are small differences of large
times, these are not. The last line printed is one JSON object; seconds unless a name says otherwise.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import statistics
import time
from importlib.metadata import version

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
os.environ.pop("ENGRAM_DEBUG_SHAPES", None)
# A process that believes it is one of several gets dense embeddings from the peer.
os.environ.pop("WORLD_SIZE", None)

import numpy as np
import torch
from engram_peft import EngramConfig, get_engram_model, get_optimizer
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 32_000
BLOCKS = [1, 5]
ORDERS = [2, 3]
HEADS_PER_ORDER = 8
HEAD_WIDTH = 80
# The peer divides this by the heads of the order, then takes the next primes: 141,400 wanted rows a head.
ROWS_PER_ORDER = 1_131_200
MEASUREMENTS = ["forward", "decode_step", "training_step", "layer_alone"]


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    """The peer builds its compression map from a tokenizer: 32,000 words, a third differing only in case."""
    words = ["<pad>", "<s>", "</s>", "<unk>"]
    stem = 0
    while len(words) < VOCAB:
        words += [f"w{stem}", f"W{stem}", f"x{stem}"]
        stem += 1
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words[:VOCAB])}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        intermediate_size=1536,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).float().eval()


def attached_llama(*, branches: int, train_mode: str):
    config = EngramConfig(
        engram_vocab_size_per_ngram=[ROWS_PER_ORDER] * len(ORDERS),
        ngram_sizes=ORDERS,
        n_head_per_ngram=HEADS_PER_ORDER,
        embedding_dim=len(ORDERS) * HEADS_PER_ORDER * HEAD_WIDTH,
        target_layers=BLOCKS,
        hc_mult=branches,
        conv_zero_init=False,
        gating_zero_init=False,
    )
    return get_engram_model(random_llama(), config, tokenizer_of_words(), train_mode=train_mode).eval()


def draw_ids(draw: str, *, batch: int, tokens: int, count: int) -> list[torch.Tensor]:
    """`count` different batches of ids [batch, tokens] int64 in [4, VOCAB)."""
    generator = np.random.default_rng(0)
    if draw == "zipf":
        # rank r with probability ~ 1/r over the whole vocabulary, ranks scattered over the ids
        weight = 1.0 / np.arange(1, VOCAB - 4 + 1)
        ids_of_rank = generator.permutation(np.arange(4, VOCAB))
        drawn = ids_of_rank[generator.choice(VOCAB - 4, size=(count, batch, tokens), p=weight / weight.sum())]
    else:
        drawn = generator.integers(4, VOCAB, size=(count, batch, tokens))
    return [torch.from_numpy(ids.astype(np.int64)) for ids in drawn]


def keep_freed_memory() -> None:
    """Let malloc reuse large blocks instead of returning each to the kernel: page faults were a third of the time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def alternate(arms: dict, *, repeats: int, warm_up: int = 1) -> dict:
    """CPU seconds of each arm's repeats. An arm is called with the number of the repeat; the warm-up is -1."""
    seconds = {name: [] for name in arms}
    for repeat in range(-warm_up, repeats):
        for name, run in arms.items():
            start = time.process_time()
            run(repeat)
            if repeat >= 0:
                seconds[name].append(time.process_time() - start)
    return seconds


def summary(seconds: dict) -> dict:
    """Median, least and most of each arm; added time is the median of the differences within a repeat."""
    out = {}
    for name, spent in seconds.items():
        out[name] = {"median_s": statistics.median(spent), "min_s": min(spent), "max_s": max(spent)}
        out[name]["repeats"] = len(spent)
        if name != "bare" and "bare" in seconds:
            added = [a - b for a, b in zip(spent, seconds["bare"], strict=True)]
            out[name]["added_s"] = statistics.median(added)
    return out


class Parts:
    """CPU seconds inside the peer's own pieces, by wrapping them; used in passes of their own."""

    def __init__(self, model) -> None:
        self.seconds: dict[str, float] = {}
        self._wrapped = []
        self._wrap(model.compressor, "compress", "compress_ids")
        self._wrap(model.hash_mapping, "hash", "hash")
        for layer in model.engram_layers.values():
            self._wrap(layer, "forward", "layers_total")
            self._wrap(layer.multi_head_embedding, "forward", "gather_rows")
            self._wrap(layer.gating, "forward", "projections_and_gate")
            self._wrap(layer.short_conv, "forward", "short_conv")

    def _wrap(self, owner, method: str, part: str) -> None:
        plain = getattr(owner, method)

        def timed(*args, **kwargs):
            start = time.process_time()
            try:
                return plain(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - start

        setattr(owner, method, timed)
        self._wrapped.append((owner, method))

    def per_call(self, calls: int) -> dict:
        """Unwrap, and give the seconds of each part divided by the calls made."""
        for owner, method in self._wrapped:
            delattr(owner, method)
        return {part: seconds / calls for part, seconds in self.seconds.items()}


def forward_times(bare, attached, batches: dict, *, repeats: int) -> dict:
    """All logits of one batch, no gradients, no cache."""

    def run(model, ids):
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    arms = {"bare": lambda r: run(bare, batches["zipf"][r % 3])}
    for draw, drawn in batches.items():
        arms[draw] = lambda r, drawn=drawn: run(attached.base_model, drawn[r % 3])
    out = summary(alternate(arms, repeats=repeats))
    for draw, drawn in batches.items():
        parts = Parts(attached)
        run(attached.base_model, drawn[1])
        run(attached.base_model, drawn[2])
        out[draw]["parts_s"] = parts.per_call(2)
    return out


def decode_times(bare, attached, ids, *, prompt: int, steps: int) -> dict:
    """One token a step after a prompt, one sequence, growing cache; and how far that is from the full forward."""
    if ids.shape[1] < prompt + steps:
        raise SystemExit(f"decoding needs {prompt + steps} tokens, the batch has {ids.shape[1]}")
    models_of = {"bare": bare, "zipf": attached.base_model}
    ids = ids[:1, : prompt + steps]
    with torch.no_grad():
        caches, logits = {}, {name: [] for name in models_of}
        for name, model in models_of.items():
            caches[name] = model(input_ids=ids[:, :prompt], use_cache=True).past_key_values

        def step(name, r):
            at = prompt + r + 1
            out = models_of[name](input_ids=ids[:, at : at + 1], past_key_values=caches[name], use_cache=True)
            logits[name].append(out.logits[:, -1])

        arms = {name: lambda r, name=name: step(name, r) for name in models_of}
        out = summary(alternate(arms, repeats=steps // 2))
        # The rest of the steps with the parts timed.
        for r in range(steps // 2, steps - 1):
            step("bare", r)
        parts = Parts(attached)
        for r in range(steps // 2, steps - 1):
            step("zipf", r)
        out["zipf"]["parts_s"] = parts.per_call(steps - 1 - steps // 2)
        for name, model in models_of.items():
            full = model(input_ids=ids, use_cache=False).logits[:, prompt:]
            out[name]["max_logit_error"] = (torch.stack(logits[name], 1) - full).abs().max().item()
            out[name]["max_logit"] = full.abs().max().item()
    return out


def state_bytes(optimizer, parameters) -> int:
    return sum(
        value.numel() * value.element_size()
        for parameter in parameters
        for value in optimizer.state.get(parameter, {}).values()
        if torch.is_tensor(value)
    )


def row_tables(model) -> list:
    return [layer.multi_head_embedding.embedding.weight for layer in model.engram_layers.values()]


def training_times(bare, attached, batches: dict, *, repeats: int) -> dict:
    """Forward, backward and optimizer step. The bare model takes Adam, as the peer gives its backbone."""
    bare.train()
    attached.train()
    arms = {"bare": (bare, torch.optim.Adam(bare.parameters(), lr=4e-4), batches["zipf"])}
    optimizer = get_optimizer(attached)
    for draw, drawn in batches.items():
        arms[draw] = (attached.base_model, optimizer, drawn)
    phases = {name: {"forward_backward": [], "optimizer": []} for name in arms}

    def step(name, r):
        model, optimizer, drawn = arms[name]
        start = time.process_time()
        model(input_ids=drawn[r % 3], labels=drawn[r % 3], use_cache=False).loss.backward()
        middle = time.process_time()
        optimizer.step()
        optimizer.zero_grad()
        phases[name]["forward_backward"].append(middle - start)
        phases[name]["optimizer"].append(time.process_time() - middle)

    out = summary(alternate({name: lambda r, name=name: step(name, r) for name in arms}, repeats=repeats))
    for name, phase in phases.items():
        for part, seconds in phase.items():
            out[name][f"{part}_s"] = statistics.median(seconds[1:])
    tables = row_tables(attached)
    others = [p for p in attached.adapters.parameters() if all(p is not table for table in tables)]
    out["optimizer_state_bytes"] = {
        "rows": sum(state_bytes(o, tables) for o in optimizer.optimizers),
        "other_memory": sum(state_bytes(o, others) for o in optimizer.optimizers),
        "bare_model": state_bytes(arms["bare"][1], list(bare.parameters())),
    }
    bare.eval()
    attached.eval()
    return out


def layer_alone_times(attached, batches: dict, *, repeats: int) -> dict:
    """One memory layer on random hidden states: addresses given, as its own collator makes them ahead of time."""
    block = BLOCKS[0]
    layer = attached.engram_layers[str(block)]
    weight = layer.multi_head_embedding.embedding.weight
    hidden_size = attached.config.hidden_size
    optimizer = torch.optim.SparseAdam([weight], lr=2e-3)
    first = batches["zipf"][0]
    hidden = torch.randn(*first.shape, hidden_size, generator=torch.Generator().manual_seed(0))
    hidden.requires_grad_(True)
    out_gradient = torch.randn(*first.shape, hidden_size, generator=torch.Generator().manual_seed(1))
    addresses = {
        draw: [
            torch.from_numpy(attached.hash_mapping.hash(attached.compressor.compress(ids))[block])
            for ids in drawn
        ]
        for draw, drawn in batches.items()
    }

    def forward(drawn, r):
        with torch.no_grad():
            layer(hidden_states=hidden, engram_hash_indices=drawn[r % 3])

    def forward_backward(drawn, r):
        for parameter in layer.parameters():
            parameter.grad = None
        hidden.grad = None
        layer(hidden_states=hidden, engram_hash_indices=drawn[r % 3]).backward(out_gradient)

    out = {"tokens": first.numel()}
    for draw, drawn in addresses.items():
        both = {
            "forward": lambda r, drawn=drawn: forward(drawn, r),
            "forward_backward": lambda r, drawn=drawn: forward_backward(drawn, r),
            "row_step": lambda r: optimizer.step(),
        }
        out[draw] = summary(alternate(both, repeats=repeats))
        heads = layer.multi_head_embedding.offsets
        out[draw]["unique_rows"] = statistics.median(torch.unique(rows + heads).numel() for rows in drawn)
        out[draw]["rows_read"] = drawn[0].numel()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="short sequences, few repeats: does it run at all"
    )
    parser.add_argument("--branches", type=int, default=1, help="hc_mult of the peer; its default is 4")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--forward-repeats", type=int, default=5)
    parser.add_argument("--training-repeats", type=int, default=2)
    parser.add_argument("--layer-repeats", type=int, default=9)
    parser.add_argument("--decode-steps", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS, help="what to time")
    parser.add_argument("--train-mode", choices=["full_finetune", "engram_only"], default="full_finetune")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.tokens, options.decode_steps = 2, 64, 16
        options.forward_repeats, options.training_repeats, options.layer_repeats = 1, 1, 1

    keep_freed_memory()
    torch.set_num_threads(1)
    started = time.time()
    bare = random_llama()
    attached = attached_llama(branches=options.branches, train_mode=options.train_mode)
    tables = row_tables(attached)
    primes = {block: attached.hash_mapping.prime_tables[block] for block in BLOCKS}
    result = {
        "benchmark": "peer_engram_peft",
        "quick": options.quick,
        "versions": {name: version(name) for name in ("engram-peft", "torch", "transformers", "numpy")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "shape": {
            "model": "Llama, random weights: hidden 512, 8 blocks, 8 heads, intermediate 1536, vocabulary 32,000",
            "batch": options.batch,
            "tokens": options.tokens,
            "blocks": BLOCKS,
            "branches": options.branches,
            "heads": len(ORDERS) * HEADS_PER_ORDER,
            "head_width": tables[0].shape[1],
            "rows_per_head_least_and_most": {
                b: [min(map(min, p)), max(map(max, p))] for b, p in primes.items()
            },
            "rows_per_table": [table.shape[0] for table in tables],
            "table_bytes": sum(table.numel() * table.element_size() for table in tables),
            "compressed_vocab": attached.hash_mapping.compressed_vocab_size,
            "train_mode": options.train_mode,
        },
    }
    batches = {
        draw: draw_ids(draw, batch=options.batch, tokens=options.tokens, count=3)
        for draw in ("zipf", "uniform")
    }
    steps = options.decode_steps
    measure = {
        "forward": lambda: forward_times(bare, attached, batches, repeats=options.forward_repeats),
        "decode_step": lambda: decode_times(
            bare, attached, batches["zipf"][0], prompt=options.tokens - steps, steps=steps
        ),
        "training_step": lambda: training_times(bare, attached, batches, repeats=options.training_repeats),
        "layer_alone": lambda: layer_alone_times(attached, batches, repeats=options.layer_repeats),
    }
    for name in options.only:
        result[name] = measure[name]()
    # Linux gives the peak in KiB.
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["wall_s"] = time.time() - started
    print(json.dumps(result))


if __name__ == "__main__":
    main()
