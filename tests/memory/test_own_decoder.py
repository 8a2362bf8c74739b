"""A decoder that is nobody's but ours calls memory layers itself: no hooks, no transformers, and a cache of its own."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from engram_lm.config import MemoryConfig  # noqa: E402
from engram_lm.memory.build import ModelShape, build_memory  # noqa: E402
from engram_lm.memory.memory import MemoryCall  # noqa: E402
from engram_lm.nn import MemoryState, Window  # noqa: E402
from matrix import text  # noqa: E402
from models import tokenizer  # noqa: E402

V, D, BLOCKS = 258, 16, 3


class Decoder(nn.Module):
    """Attention of one head over an own list of keys, and memory before the blocks that its layers name."""

    def __init__(self, memory_config):
        super().__init__()
        self.embed = nn.Embedding(V, D, dtype=torch.float64)
        self.blocks = nn.ModuleList(nn.Linear(D, 3 * D, dtype=torch.float64) for _ in range(BLOCKS))
        shape = ModelShape(n_blocks=BLOCKS, hidden_size=D, branches=1, eps=1e-6, vocab_size=V)
        self.memory = build_memory(memory_config, shape, tokenizer(), like=self.embed.weight)
        self.layers = self.memory.slots  # parameters

    def forward(self, ids_BT, cache=None):
        """Logits; cache: {"keys": a list a block, "memory": MemoryState}, grown in place."""
        state = None if cache is None else cache["memory"]
        window = Window.begin(ids_BT, None, state=state, keep=self.memory.keep)
        call = MemoryCall(self.memory, window)
        hidden_BTD = self.embed(ids_BT)
        for number, block in enumerate(self.blocks):
            for layer in self.memory.slots:
                if layer.block == number:
                    hidden_BTD = hidden_BTD + layer(hidden_BTD, call).delta
            query, key, value = block(hidden_BTD).chunk(3, -1)
            past = 0
            if cache is not None:
                before = cache["keys"].setdefault(number, [])
                before.append((key, value))
                past = sum(k.shape[1] for k, _ in before[:-1])
                key, value = (torch.cat(parts, 1) for parts in zip(*before, strict=True))
            seen = torch.ones(ids_BT.shape[1], key.shape[1], dtype=torch.bool).tril(past)
            scores = (query @ key.transpose(1, 2) / D**0.5).masked_fill(~seen, -torch.inf)
            hidden_BTD = hidden_BTD + scores.softmax(-1) @ value
        return hidden_BTD @ self.embed.weight.T


@pytest.fixture(params=["paper", "deepseek-v4.1"])
def decoder(request):
    torch.manual_seed(0)
    config = MemoryConfig(layers=(0, 2), profile=request.param, rows_per_head=211, head_width=8, heads=2)
    made = Decoder(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in made.memory.slots:
            layer.table.rows_view().normal_(generator=generator)
            for name, parameter in layer.named_parameters():
                if name != "handle":
                    parameter.add_(torch.randn(parameter.shape, generator=generator).double() * 0.5)
    return made


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3])
def test_cached_decoding_gives_what_one_pass_gives(decoder, size):
    ids = text()
    whole = decoder(ids)
    cache = {"keys": {}, "memory": MemoryState(keep=decoder.memory.keep, fixed=False)}
    parts = [decoder(part, cache) for part in ids.split(size, 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10
    # without the state of what came before, the conv and the hash would see less
    cache = {"keys": {}, "memory": None}
    parts = [decoder(part, cache) for part in ids.split(size, 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() > 1e-3


def test_rows_and_layers_train(decoder):
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    tables = [layer.table.rows_view().clone() for layer in decoder.memory.slots]
    loss = decoder(text()).square().mean()
    loss.backward()
    optimizer.step()
    for layer, before in zip(decoder.memory.slots, tables, strict=True):
        assert not torch.equal(layer.table.rows_view(), before)
        assert layer.table.gradients.updates == 1
