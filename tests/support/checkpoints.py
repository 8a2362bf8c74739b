"""Small checkpoints as the families ship them: exact names, dtypes and scale layout, written byte by byte.

The writer here knows nothing of `engram_lm.tables`: it is what the reader is tested against.
"""

import json
import struct

import numpy as np

QWEN = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding"
BYTES = {
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "BF16": "<u2",
    "F16": "<f2",
    "F32": "<f4",
    "I64": "<i8",
    "U8": np.uint8,
}


def write_safetensors(path, tensors, *, metadata=None):
    """tensors: {name: (dtype, array whose bytes are the tensor's)}, in this order."""
    header, blobs, at = {} if metadata is None else {"__metadata__": metadata}, [], 0
    for name, (dtype, array) in tensors.items():
        blob = np.ascontiguousarray(array, dtype=BYTES[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(np.shape(array)), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    write_raw(path, header, b"".join(blobs))
    return path


def write_raw(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_sharded(directory, files, *, index="model.safetensors.index.json"):
    """files: {file name: tensors}."""
    places = {}
    for file, tensors in files.items():
        write_safetensors(directory / file, tensors)
        places |= dict.fromkeys(tensors, file)
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def v41_config(*, rows_per_head=97, layers=(1, 14), orders=3, heads=2, width=64, vocab_size=40):
    """The text part of a small DeepSeek-V4.1 config."""
    return {
        "model_type": "deepseek_v41",
        "vocab_size": vocab_size,
        "engram_layer_ids": list(layers),
        "engram_max_ngram_size": orders,
        "engram_n_heads": heads,
        "engram_head_dim": width,
        "engram_vocab_size": rows_per_head,
        "engram_compressed_vocab_size": vocab_size,
        "engram_pad_token_id": 2,
    }


def v41_tensors(layer, n_rows, width=64, *, seed=0):
    """Codes without NaN, scales around 2^-6, and tensors that are no table's."""
    rng = np.random.default_rng((seed, layer))
    codes = rng.integers(0, 256, (n_rows, width), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x3C
    scales = rng.integers(116, 126, (n_rows, width // 32), dtype=np.uint8)
    return {
        f"layers.{layer}.engram.embed.scale": ("F8_E8M0", scales),
        f"layers.{layer}.engram.embed.weight": ("F8_E4M3", codes),
        f"layers.{layer}.engram.k_weight": ("F32", rng.normal(size=(4, 8))),
        f"layers.{layer}.engram.wkv.weight": ("F8_E4M3", np.zeros((8, 12), np.uint8)),
    }


def numbers_of_v41(tensors, layer):
    """float64 rows, by the definition: e4m3 code times 2^(scale - 127)."""
    codes = tensors[f"layers.{layer}.engram.embed.weight"][1]
    scales = tensors[f"layers.{layer}.engram.embed.scale"][1].astype(np.float64)
    return e4m3(codes) * np.exp2(scales - 127).repeat(32, axis=1)


def e4m3(codes):
    """float64, by the definition of the format."""
    exponent, fraction = (codes >> 3 & 15).astype(np.float64), (codes & 7).astype(np.float64)
    value = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    value = np.where((codes & 0x7F) == 0x7F, np.nan, value)
    return np.where(codes & 0x80, -value, value)


def bf16(bits):
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


def qwen_codes(n_rows, width=20, *, seed=0):
    """bfloat16 bits of normal numbers."""
    values = np.random.default_rng(seed).normal(0, 0.02, (n_rows, width)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2")


def write_tokenizer(directory, n_ids):
    """tokenizer.json with one word an id."""
    from tokenizers import Tokenizer, decoders, models

    words = {f"word{i}": i for i in range(n_ids)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer
