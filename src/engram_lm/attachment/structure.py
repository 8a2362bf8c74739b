"""Where memory can enter a transformers model: its decoder and the blocks, found by structure, not by name.

The decoder is the module that takes `input_ids`, owns a ModuleList as long as config.num_hidden_layers, and passes its
keyword arguments on to every block. That holds for Llama, Qwen, Gemma, Mistral, SmolLM, GPT-2, mixtures of experts and
hybrids; where it does not, the error says what was looked for.
"""

import inspect
from typing import Any, NamedTuple

from torch import nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from engram_lm.errors import ModelError
from engram_lm.kvcache import cache_name
from engram_lm.memory.build import ModelShape


class Decoder(NamedTuple):
    """The parts of a model that memory needs to know."""

    module: nn.Module
    blocks: nn.ModuleList
    hidden_size: int
    branches: int
    eps: float
    vocab_size: int

    @property
    def shape(self) -> ModelShape:
        """The numbers of it that a memory is built from."""
        return ModelShape(len(self.blocks), self.hidden_size, self.branches, self.eps, self.vocab_size)


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder of a decoder-only causal model. ModelError when there is none, or more than one."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ModelError(f"{type(model).__name__} is not a transformers model: it has no config.")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder; memory attaches to decoder-only models."
        )
    text_config = config.get_text_config(decoder=True)
    n_blocks = getattr(text_config, "num_hidden_layers", None)
    found = []
    for _, module in model.named_modules():
        if "input_ids" not in inspect.signature(module.forward).parameters:
            continue
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == n_blocks:
                found.append((module, child))
    if len(found) != 1:
        many = "none" if not found else f"{len(found)}: {', '.join(type(m).__name__ for m, _ in found)}"
        raise ModelError(
            f"Memory needs one decoder in {type(model).__name__}: a module that takes input_ids and owns a ModuleList of "
            f"num_hidden_layers = {n_blocks} blocks. Found {many}."
        )
    module, blocks = found[0]
    if not any(p.kind == p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values()):
        raise ModelError(
            f"{type(module).__name__}.forward takes no **kwargs, so memory cannot hand the token ids to its blocks."
        )
    if cache_name(module.forward) is None or not _counts_tokens(text_config):
        raise ModelError(
            f"{type(module).__name__} keeps its state in another kind of cache than the past_key_values of attention, which "
            "memory cannot be part of."
        )
    eps = _first(
        text_config, "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon"
    )
    return Decoder(
        module=module,
        blocks=blocks,
        hidden_size=_first(text_config, "hidden_size", "n_embd", "d_model"),
        branches=getattr(text_config, "hc_count", None) or 1,
        eps=1e-6 if eps is None else eps,
        vocab_size=text_config.vocab_size,
    )


def _counts_tokens(config: Any) -> bool:
    """Whether the cache of this model knows how many tokens it has read. That of a model without attention does not."""
    layers = DynamicCache(config=config).layers
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def _first(config: Any, *names: str) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None
