"""One memory layer against its own matrix products, timed in turns: what everything but the products costs.

    python benchmarks/layer.py [repeats]

From token ids and hidden states to what is added: addresses hashed, rows gathered from a full-size table, one fused
projection, gate, short conv with weights that are not zero. Backward goes to the hidden states, all weights and the
rows, whose gradients are sorted and summed a row. The matrix products are those of the projection: one forward, two
backward. The last line is JSON.
"""

import json
import sys

import timing

timing.one_thread()

import torch
from machine import circumstances
from shape import BLOCKS, HEAD_WIDTH, HEADS_PER_ORDER, HIDDEN, ORDERS, ROWS_PER_HEAD, SEED, VOCAB, draw_ids

from engram_lm.addressing import PROFILES, resolve
from engram_lm.nn import EngramLayer, Window
from engram_lm.tables import DeviceTable, pending_rows

# of forward, and of forward and backward, over the matrix products alone
LIMITS = {"forward": 1.4, "forward_backward": 1.3}
BATCH, TOKENS = 4, 512


def measure(*, draw: str, repeats: int = 15, rows_per_head: int = ROWS_PER_HEAD) -> dict:
    """Seconds of the layer and of its parts, and the two ratios, for one draw of ids."""
    torch.manual_seed(SEED)
    profile = PROFILES["paper"].replace(
        orders=tuple(ORDERS),
        heads=HEADS_PER_ORDER,
        rows_per_head=rows_per_head,
        head_width=HEAD_WIDTH,
        conv_dilation=max(ORDERS),
    )
    (scheme,) = resolve(profile, vocab_size=VOCAB, layers=BLOCKS[:1], fill_id=0)
    table = DeviceTable(n_rows=scheme.padded_rows, width=HEAD_WIDTH)
    table.rows_view().normal_(std=0.1)
    memory_width = scheme.columns * HEAD_WIDTH
    layer = EngramLayer(
        hidden_size=HIDDEN,
        memory_width=memory_width,
        conv_kernel=profile.conv_kernel,
        conv_dilation=profile.conv_dilation,
    )
    torch.nn.init.normal_(layer.conv_weight, std=0.1)
    handle = layer.handle = table.gradients.handle
    batches = draw_ids(draw, batch=BATCH, tokens=TOKENS, count=3)
    hidden_BTD = torch.randn(BATCH, TOKENS, HIDDEN, requires_grad=True)
    out_gradient_BTD = torch.randn(BATCH, TOKENS, HIDDEN)
    weight_ED = layer.projection.weight
    rows_NE = torch.randn(BATCH * TOKENS, memory_width, requires_grad=True)
    product_gradient = torch.randn(BATCH * TOKENS, weight_ED.shape[0])

    def hashed(r):
        return torch.from_numpy(scheme.addresses(batches[r % 3].numpy()))

    def run(r):
        rows_BTE = table.read(hashed(r), handle).flatten(2)
        return layer(hidden_BTD, rows_BTE, Window.begin(batches[r % 3], None)).delta

    def forget():
        for tensor in (*layer.parameters(), hidden_BTD, rows_NE):
            tensor.grad = None

    def forward(r):
        with torch.no_grad():
            run(r)

    def forward_backward(r):
        forget()
        run(r).backward(out_gradient_BTD)

    def products(r):
        with torch.no_grad():
            rows_NE @ weight_ED.T

    def products_backward(r):
        forget()
        (rows_NE @ weight_ED.T).backward(product_gradient)

    def gather(address):
        with torch.no_grad():
            table.gather(address)

    addresses = [hashed(r) for r in range(3)]
    seconds = timing.alternate(
        {
            "products_forward": products,
            "forward": forward,
            "products_forward_backward": products_backward,
            "forward_backward": forward_backward,
            "hash": hashed,
            "gather": lambda r: gather(addresses[r % 3]),
        },
        repeats=repeats,
        warm_up=2,
    )
    forward_backward(0)
    per_token = 1e6 / (BATCH * TOKENS)
    return {
        "tokens": BATCH * TOKENS,
        "hidden": HIDDEN,
        "memory_width": memory_width,
        "rows": table.n_rows,
        "rows_read": addresses[0].numel(),
        "unique_rows": pending_rows(layer),
        "seed": SEED,
        "us_a_token": {
            name: timing.spread([s * per_token for s in spent], "us") for name, spent in seconds.items()
        },
        "ratio": {
            name: {**timing.ratio(seconds, name, f"products_{name}"), "limit": limit}
            for name, limit in LIMITS.items()
        },
    }


def readable(draw: str, found: dict) -> str:
    """What `measure` found, to be read."""
    us = {name: spread["median_us"] for name, spread in found["us_a_token"].items()}
    lines = [
        f"one layer, {found['tokens']:,} tokens ({draw}), {found['memory_width']} -> 2 x {found['hidden']}"
    ]
    for name, ratio in found["ratio"].items():
        lines.append(
            f"  {name:18}{us[name]:7.2f} us a token, its products {us[f'products_{name}']:.2f}: "
            f"{ratio['median_ratio']:.2f} x  ({ratio['min_ratio']:.2f} to {ratio['max_ratio']:.2f}; limit {ratio['limit']})"
        )
    lines.append(f"  of these, hash {us['hash']:.2f} and gather {us['gather']:.2f} us a token")
    return "\n".join(lines)


def main(repeats: int = 15) -> None:
    timing.keep_freed_memory()
    torch.set_num_threads(1)
    found = {draw: measure(draw=draw, repeats=repeats) for draw in ("zipf", "text")}
    for draw, timings in found.items():
        print(readable(draw, timings))
    print(json.dumps({"benchmark": "layer", **circumstances("torch", "numpy", "numba"), **found}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
