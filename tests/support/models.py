"""Tiny random models of many shapes, a tokenizer for them, and memories far from zero to put on them.

    model = build("llama", torch.float64)
    give_memory(model, "paper")

Every model has VOCAB tokens, four blocks and width 32, and weights large enough that logits differ by whole units.
"""

import warnings
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from engram_lm.attachment import MemoryConfig, attach, memories
from engram_lm.bases.recipes import Recipe, build_model, byte_tokenizer

PAD, EOS = 0, 1
SMALL = {"vocab_size": 258, "num_hidden_layers": 4, "hidden_size": 32, "max_position_embeddings": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Bytes and two special tokens. Capitals share their canonical id with small letters."""
    vocab = {"<pad>": PAD, "<eos>": EOS}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    bytes_only = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(["<pad>", "<eos>"])
    return hf.PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<pad>", eos_token="<eos>")


def _config(name: str) -> Any:
    """The config of one architecture; KeyError for an unknown name."""
    common = {**SMALL, **TOKENS, "initializer_range": 0.15}
    grouped = {**common, **HEADS, "intermediate_size": 48}
    full_heads = {**grouped, "num_key_value_heads": 4}
    sliding = {"sliding_window": 6}
    return {
        "llama": lambda: hf.LlamaConfig(**grouped),
        "qwen2": lambda: hf.Qwen2Config(**grouped),
        "qwen3": lambda: hf.Qwen3Config(**grouped, head_dim=8),
        "gpt2": lambda: hf.GPT2Config(**common, n_head=4, n_inner=48),
        "qwen3_moe": lambda: hf.Qwen3MoeConfig(**grouped, **EXPERTS, head_dim=8, num_experts=4),
        "mixtral": lambda: hf.MixtralConfig(**grouped, num_local_experts=4, num_experts_per_tok=2),
        "mistral": lambda: hf.MistralConfig(**grouped, **sliding),
        "gemma3": lambda: hf.Gemma3TextConfig(
            **grouped, **sliding, head_dim=8, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        "qwen3_next": lambda: hf.Qwen3NextConfig(
            **grouped, **EXPERTS, **LINEAR, head_dim=8, num_experts=4, shared_expert_intermediate_size=16
        ),
        "lfm2": lambda: hf.Lfm2Config(
            **grouped,
            layer_types=["conv", "full_attention", "conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
        ),
        "gemma": lambda: hf.GemmaConfig(**grouped, head_dim=8),
        "gemma2": lambda: hf.Gemma2Config(**grouped, **sliding, head_dim=8),
        "phi3": lambda: hf.Phi3Config(**grouped),
        "olmo2": lambda: hf.Olmo2Config(**grouped),
        "smollm3": lambda: hf.SmolLM3Config(**grouped),
        "starcoder2": lambda: hf.Starcoder2Config(**grouped),
        "granite": lambda: hf.GraniteConfig(**grouped),
        "cohere2": lambda: hf.Cohere2Config(**grouped, **sliding),
        "gpt_oss": lambda: hf.GptOssConfig(
            **grouped, **sliding, head_dim=8, num_local_experts=4, num_experts_per_tok=2
        ),
        "deepseek_v3": lambda: hf.DeepseekV3Config(
            **full_heads,
            **EXPERTS,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**common, num_attention_heads=4, intermediate_size=48),
        "gptj": lambda: hf.GPTJConfig(**common, n_head=4, rotary_dim=4),
        "falcon": lambda: hf.FalconConfig(**common, num_attention_heads=4),
        "opt": lambda: hf.OPTConfig(**common, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32),
        "bloom": lambda: hf.BloomConfig(**common, n_head=4),
        "phi": lambda: hf.PhiConfig(**full_heads),
        "stablelm": lambda: hf.StableLmConfig(**full_heads),
        "bamba": lambda: hf.BambaConfig(
            **grouped,
            attn_layer_indices=[1, 3],
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_n_groups=1,
            mamba_d_state=8,
            mamba_chunk_size=8,
        ),
        "granitemoehybrid": lambda: hf.GraniteMoeHybridConfig(
            **grouped,
            layer_types=["mamba", "attention", "mamba", "attention"],
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=16,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_n_groups=1,
            mamba_d_state=8,
            mamba_chunk_size=8,
            position_embedding_type="rope",
        ),
        "jamba": lambda: hf.JambaConfig(
            **grouped,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            use_mamba_kernels=False,
            mamba_d_state=8,
            mamba_dt_rank=4,
        ),
        "mamba": lambda: hf.MambaConfig(**common, state_size=8),
        "mamba2": lambda: hf.Mamba2Config(
            **common, num_heads=8, head_dim=8, n_groups=1, state_size=8, chunk_size=8, expand=2
        ),
        "t5": lambda: hf.T5Config(
            vocab_size=258, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=PAD
        ),
        "bert": lambda: hf.BertConfig(**full_heads | {"is_decoder": True}),
    }[name]()


# What the state matrix runs on, and what it calls them.
SHAPES = {
    "llama": "Llama",
    "qwen3": "Qwen3",
    "gpt2": "GPT-2",
    "qwen3_moe": "Qwen3-MoE (experts)",
    "mistral": "Mistral (sliding window 6)",
    "gemma3": "Gemma 3 (sliding and full)",
    "qwen3_next": "Qwen3-Next (linear attention)",
    "lfm2": "LFM2 (short conv)",
}


def build(name: str, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> nn.Module:
    """A random model in eval mode; its generation never ends before the length asked for."""
    torch.manual_seed(seed)
    config = _config(name)
    # the grouped matrix product of experts has no float64
    config._experts_implementation = "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = hf.AutoModelForSeq2SeqLM if name == "t5" else hf.AutoModelForCausalLM
        model = kind.from_config(config, attn_implementation=None)
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start at constants that hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


_MEMORIES = {
    "paper": [MemoryConfig(layers=(1, 2), rows_per_head=211, head_width=8, heads=2)],
    # EOS ends the look-back, raw ids, one block earlier and one later
    "qwen-ple": [MemoryConfig(layers=(0, 3), profile="qwen-ple", rows_per_head=211, head_width=8, heads=2)],
    # with and without conv, of different reach, on one block and on others
    "several": [
        MemoryConfig(layers=(1, 2), name="long", rows_per_head=211, head_width=8, heads=2),
        MemoryConfig(
            layers=(0, 2), name="bare", profile="deepseek-v4.1", rows_per_head=101, head_width=4, heads=2
        ),
        MemoryConfig(
            layers=(1,),
            name="short",
            profile="qwen-ple",
            orders=(2,),
            heads=2,
            rows_per_head=101,
            head_width=8,
        ),
    ],
}
MEMORIES = tuple(_MEMORIES)


def give_memory(
    model: nn.Module, which: str = "paper", *, tokenizer: Any = None, seed: int = 1, projection: float = 0.3
) -> nn.Module:
    """Attach memories that speak: rows of standard deviation 1, conv weights far from zero, norms that are not 1."""
    for config in _MEMORIES[which]:
        attach(model, tokenizer or _tokenizer(), config)
    make_loud(model, seed=seed, projection=projection)
    return model


def make_loud(model: nn.Module, *, seed: int = 1, projection: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for memory in memories(model).values():
            for slot in memory.slots:
                rows = slot.table.rows_view()
                rows.copy_(torch.randn(rows.shape, generator=generator))
                for name, parameter in slot.named_parameters():
                    if name != "handle":
                        noise = torch.randn(parameter.shape, generator=generator)
                        around, spread = {
                            "conv_weight": (0.0, 0.7),
                            "projection.weight": (0.0, projection),
                        }.get(name, (1.0, 0.3))
                        parameter.copy_(around + spread * noise)


_KEPT: list[Any] = []


def _tokenizer() -> Any:
    if not _KEPT:
        _KEPT.append(tokenizer())
    return _KEPT[0]


def saved_doll(directory: Any) -> tuple[Any, nn.Module, Any]:
    """A scratch model of bytes, saved as transformers save theirs: (directory, model, tokenizer)."""
    recipe = Recipe(
        name="doll",
        vocab_size=258,
        hidden_size=32,
        layers=2,
        heads=2,
        key_value_heads=1,
        intermediate_size=64,
    )
    words = byte_tokenizer()
    model = build_model(recipe, tokenizer=words).eval()
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory, model, words


def qwen4_exp(**changes: Any) -> nn.Module:
    """A random Qwen4-Exp with N-gram tables before two blocks, as transformers builds it."""
    options = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["linear_attention"] * 3 + ["indexed_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [2, 3],
        "ple_embed_dim": 24,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 101,
        "make_ngram_vocab_size_divisible_by": 8,
        "eos_token_id": 3,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "initializer_range": 0.15,
        "split_ngram_parts": 1,
    }
    model = hf.Qwen4ExpForCausalLM(hf.Qwen4ExpTextConfig(**options | changes)).eval()
    for module in model.modules():
        if hasattr(module, "ngram_embedding"):
            # so that the rows are heard: a new conv is zero, and new rows are small
            torch.nn.init.normal_(module.ngram_embedding.weight)
    return model
