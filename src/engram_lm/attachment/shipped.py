"""transformers' own Qwen4-Exp with its table where the checkpoint has it: read from host memory or disk, never loaded.

    model = engram_lm.load_shipped(directory, rows="disk")       # rows="host": one copy in this machine's memory
    model.generate(**tokenizer("…", return_tensors="pt"))

The model is transformers' in every line but one: `ngram_embedding`, an nn.Embedding of 51 billion numbers, becomes a
module that gathers the same rows from the safetensors files in place. Logits are those of the loaded model, bit for bit;
what the state_dict lacks is the rows. They do not train here.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engram_lm.errors import CheckpointError, ConfigError, ModelError
from engram_lm.storage import DiskStore, HostStore, Layout, RowStore, open_shipped

Rows = Literal["disk", "host"] | Callable[[Layout], RowStore]

_PATCH = threading.RLock()
_ROW_NAMES = r"ngram_embedding\."


class StoredEmbedding(nn.Module):
    """`nn.Embedding` without a weight: rows [..., width] of a store at ids int64 [...], in `dtype`, on the ids' device."""

    def __init__(self, store: RowStore, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.store, self.dtype = store, dtype
        self.num_embeddings, self.embedding_dim = store.n_rows, store.width
        # transformers asks where the weight lies and brings the ids there; a plain tensor is no parameter
        self.weight = torch.empty(0, device="cpu")

    @torch.compiler.disable
    def forward(self, ids: Tensor) -> Tensor:
        address = ids.detach().to("cpu", torch.int64).numpy()
        if self.dtype == torch.bfloat16:
            rows = torch.from_numpy(self.store.gather(address, dtype="bf16")).view(torch.bfloat16)
        else:
            rows = torch.from_numpy(self.store.gather(address)).to(self.dtype)
        return rows.to(ids.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "StoredEmbedding":
        """Rows leave in the dtype the model is cast to; they stay where they are."""
        super()._apply(fn, *args, **kwargs)
        self.dtype = fn(torch.zeros(1, dtype=self.dtype)).dtype
        return self

    def __deepcopy__(self, memo: dict) -> "StoredEmbedding":
        twin = memo[id(self)] = StoredEmbedding(self.store, dtype=self.dtype)
        return twin.train(self.training)

    def __reduce__(self) -> tuple:
        raise CheckpointError(
            f"The rows of {self.store.name} are in their files: a model with them cannot be pickled."
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {type(self.store).__name__}"


def load_shipped(
    checkpoint: str | Path, *, rows: Rows = "disk", model_class: Any = None, **options: Any
) -> nn.Module:
    """A Qwen4-Exp checkpoint in a directory as transformers loads it, with its rows left in the files.

    rows: "disk" reads them when asked, past the page cache; "host" copies them into memory once, as they are encoded; a
    function makes a store of a layout (say, CachedStore(DiskStore(layout), …)).
    model_class, options: whose `from_pretrained`, and what it takes besides (default AutoModelForCausalLM).

    Raises: ModelError for another family; CheckpointError for a table of other rows than the model wants.
    """
    import transformers

    make = _maker(rows)
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    family = config.get_text_config().model_type
    if not family.startswith("qwen4_exp"):
        raise ModelError(
            f"{checkpoint} is a {family}; rows are read in place in transformers' qwen4_exp. Open others with "
            "engram_lm.storage.open_shipped."
        )
    tables = open_shipped(checkpoint)
    with _without_rows(tables, make):
        model = (model_class or transformers.AutoModelForCausalLM).from_pretrained(checkpoint, **options)
    return _guarded(model, checkpoint)


def leave_rows(model: nn.Module, checkpoint: str | Path, *, rows: Rows = "disk") -> nn.Module:
    """Let a loaded Qwen4-Exp model read its rows from `checkpoint`, and give back the memory they took. In place."""
    make, tables, n_found = _maker(rows), open_shipped(checkpoint), 0
    for module in list(model.modules()):
        if type(module).__name__ == "Qwen4ExpTextNGramEmbedding":
            _replace(module, tables, make)
            n_found += 1
    if not n_found:
        raise ModelError(f"{type(model).__name__} has no n-gram embedding of transformers' qwen4_exp.")
    return _guarded(model, checkpoint)


def _maker(rows: Rows) -> Callable[[Layout], RowStore]:
    if callable(rows):
        return rows
    if rows not in ("disk", "host"):
        raise ConfigError(f"rows is {rows!r}; wanted 'disk', 'host' or a function from a layout to a store.")
    return DiskStore if rows == "disk" else HostStore.load


def _replace(module: nn.Module, tables: Mapping[Any, Layout], make: Callable[[Layout], RowStore]) -> None:
    old, layout = module.ngram_embedding, tables.get(module.layer_idx)
    if layout is None:
        raise CheckpointError(
            f"The model reads memory in layer {module.layer_idx}; the checkpoint has tables for layers "
            f"{', '.join(map(str, tables))}."
        )
    if (layout.n_rows, layout.width) != (old.num_embeddings, old.embedding_dim):
        raise CheckpointError(
            f"{layout.name} has {layout.n_rows:,} rows of {layout.width} numbers; the model wants {old.num_embeddings:,} "
            f"of {old.embedding_dim}."
        )
    # rows of an FP8Embedding leave in the dtype of its scale, and loading rounds the scale to the model's
    scale = getattr(old, "weight_scale", None)
    dtype = (old.weight if scale is None else scale).dtype
    if layout.codec == "fp8_e4m3":
        rounded = torch.tensor(layout.scale, device="cpu").to(dtype) if scale is None else scale
        layout = dataclasses.replace(layout, scale=float(rounded))
    module.ngram_embedding = StoredEmbedding(make(layout), dtype=dtype)


@contextlib.contextmanager
def _without_rows(tables: Mapping[Any, Layout], make: Callable[[Layout], RowStore]) -> Iterator[None]:
    """While a model is built: every n-gram embedding becomes a StoredEmbedding before weights are looked for, and the rows
    in the files are no surprise to the loader. from_pretrained builds on the meta device, so nothing is allocated."""
    from transformers.models.qwen4_exp import modeling_qwen4_exp as modeling

    owner = modeling.Qwen4ExpTextNGramEmbedding
    build = owner.__init__

    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        _replace(self, tables, make)

    models = [
        c
        for c in vars(modeling).values()
        if "_keys_to_ignore_on_load_unexpected" in getattr(c, "__dict__", ())
    ]
    with _PATCH:
        kept = {c: c._keys_to_ignore_on_load_unexpected for c in models}
        owner.__init__ = built
        for c, names in kept.items():
            c._keys_to_ignore_on_load_unexpected = [*(names or ()), _ROW_NAMES]
        try:
            yield
        finally:
            owner.__init__ = build
            for c, names in kept.items():
                c._keys_to_ignore_on_load_unexpected = names


def _guarded(model: nn.Module, checkpoint: str | Path) -> nn.Module:
    """Saving would write a checkpoint without rows: refuse, on this model alone."""

    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        raise CheckpointError(
            f"This model reads its rows from {checkpoint} and does not hold them: saving it would lose them. Copy that "
            "checkpoint, or load it with transformers."
        )

    model.save_pretrained = save_pretrained
    return model
