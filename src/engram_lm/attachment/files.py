"""A memory on disk: a directory that says what it belongs to and refuses to be read as anything else.

    DIR/memory.json                  format, version, save id, base, and for every memory its config, and for every table its
                                     identity, its number of updates, and the number of the training run they are of
        memory.safetensors           projections, norms, convs, handles
        tokens-NAME.bin              the token map
        rows-NAME-BLOCK.safetensors  the rows of one table
        state-NAME-BLOCK.safetensors row-optimizer state (checkpoints only)
        tokenizer files, README.md   what `AutoTokenizer` reads, and a card
        base/ or adapter/            the base model where it was trained too, or its LoRA adapter

Every file and folder is written beside its target and moved into place, memory.json last; all carry one save id (a base
or adapter beside them its fingerprint), so that a directory with files of two saves is refused. Loading compares address
identities, sizes, and the base's fingerprint.

"run" stands in memory.json beside "updates", and in the metadata of memory.safetensors and of the files of rows and row
state. It is drawn at random at the first update and mixed with every later one (`tables.gradients`), so that weights and
rows of different runs are told apart where their numbers of updates are equal. Memories saved before it have none, and are
read without this check.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from engram_lm import durable
from engram_lm.addressing import Identity
from engram_lm.attachment.card import card
from engram_lm.attachment.memory import RUN
from engram_lm.attachment.placement import Tier
from engram_lm.attachment.rows import find_rows, packed_name, read_tensors
from engram_lm.bases.base import load_base, quiet_libraries
from engram_lm.config import MemoryConfig
from engram_lm.errors import CheckpointError, EngramError
from engram_lm.identity import BaseRef, fingerprint_of, require_base
from engram_lm.tables import LoggedTable
from engram_lm.vocab import TokenMap

FORMAT, VERSION = "engram-lm memory", 1
MANIFEST = "memory.json"

BaseFiles = Literal["auto", "always", "never"]


def save_memory(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    tokenizer: Any = None,
    base_files: BaseFiles = "auto",
    row_dtype: torch.dtype | None = None,
    row_state: bool = False,
) -> Path:
    """Write every memory of `model`; the base's weights only where they are not what the memory was attached to.

    Args:
        tokenizer: default the one the memory was attached with.
        base_files: "auto" saves the base when it was trained or came from a scratch recipe, "never" refers to it by name.
        row_dtype: store rows as bfloat16 or float16 (they load into the config's row_dtype); default as they are.
        row_state: also write the row optimizers' state, for training to go on.
    """
    from engram_lm.attachment import _runtime

    runtime = _runtime(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(".*.*"):
        if re.fullmatch(r"[0-9a-f]{16}", left.suffix[1:]):
            _remove(left)  # of a save that was killed
    save_id = secrets.token_hex(8)
    marks = {"save_id": save_id, "format": FORMAT}
    staged = directory / f".staged.{save_id}"
    waiting: list[tuple[Path, Path]] = []

    def put(name: str, tensors: dict[str, Tensor], **more: str) -> None:
        target = directory / name
        beside = directory / f".{name}.{save_id}"
        waiting.append((beside, target))
        held = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
        try:
            save_file(held, beside, metadata={**marks, **more})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{target} cannot be written: {error}. What was there before is untouched."
            ) from None

    try:
        entries, parameters, runs = [], {}, {}
        for memory in runtime.memories.values():
            tables = []
            for index, slot in enumerate(memory.slots):
                if type(slot.projection) is not nn.Linear:
                    raise CheckpointError(
                        f"The projection of {memory.name!r} was replaced by {type(slot.projection).__name__}, which a memory "
                        'cannot be loaded into. Give PEFT exclude_modules=".*engram.*".'
                    )
                gradients = slot.table.gradients
                gradients.check_updates()
                weights = {k: v for k, v in slot.state_dict().items() if k != RUN}
                parameters |= {f"{memory.name}.{index}.{k}": v for k, v in weights.items()}
                runs[f"{memory.name}.{index}"] = gradients.run
                identity, stem = slot.scheme.identity, f"{memory.name}-{slot.block}"
                log, chain = None, None
                if isinstance(slot.table, LoggedTable):
                    tensors = {}
                    if row_state:
                        log = slot.table.where()
                    else:
                        beside = directory / f".{packed_name(stem)}.{save_id}"
                        waiting.append((beside, directory / packed_name(stem)))
                        slot.table.store.fold(beside, note=save_id)
                        chain = slot.table.store.chain
                else:
                    tensors = slot.table.checkpoint()
                    rows = tensors.pop("rows")
                    put(
                        f"rows-{stem}.safetensors",
                        {"rows": rows.to(row_dtype or rows.dtype)},
                        identity=identity.hash,
                        run=str(gradients.run),
                    )
                if row_state and tensors:
                    put(
                        f"state-{stem}.safetensors",
                        tensors,
                        rule=json.dumps(gradients.rule.to_json()),
                        run=str(gradients.run),
                    )
                tables.append(
                    {
                        "block": slot.block,
                        "rows": slot.table.n_rows,
                        "width": slot.table.width,
                        "updates": gradients.updates,
                        "run": gradients.run,
                        "row_state": bool(row_state and tensors),
                        **({"log": log} if log is not None else {}),
                        **({"chain": chain} if chain is not None else {}),
                        "identity": identity.hash,
                        "identity_facts": json.loads(identity.json),
                    }
                )
            beside = directory / f".tokens-{memory.name}.bin.{save_id}"
            waiting.append((beside, directory / f"tokens-{memory.name}.bin"))
            memory.token_map.save(beside)
            entries.append({"config": memory.config.to_json(), "tables": tables})
        put("memory.safetensors", parameters, config=_config_hash(entries), run=json.dumps(runs))
        kept = _save_base(model, staged, runtime.base, base_files)
        tokenizer = tokenizer if tokenizer is not None else runtime.tokenizer
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(staged)
        if staged.is_dir():
            waiting += [(path, directory / path.name) for path in sorted(staged.iterdir())]
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "save_id": save_id,
            "base": asdict(runtime.base),
            "base_files": kept,
            "base_files_sha256": fingerprint_of(model) if kept == "base" else None,
            "adapter_sha256": _adapter_hash(staged) if kept == "adapter" else None,
            "memories": entries,
        }
        beside = directory / f".{MANIFEST}.{save_id}"
        beside.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf8")
        waiting.append((beside, directory / MANIFEST))
        mode = beside.stat().st_mode
        for part, _ in waiting:
            for path in [part] if part.is_file() else [x for x in part.rglob("*") if x.is_file()]:
                path.chmod(mode)  # safetensors writes files that only their owner can read
                durable.sync_path(path)
    except BaseException:
        for path in [staged, *(path for path, _ in waiting)]:
            _remove(path)
        raise
    for path, target in waiting:
        earlier = directory / f".{target.name}.{save_id}"
        if path.is_dir() and target.exists():
            durable.rename(target, earlier)  # a directory replaces none that has files
        durable.rename(path, target)
        _remove(earlier)
    _remove(staged)
    durable.write_atomic(directory / "README.md", card(manifest))
    return directory


def from_pretrained(
    directory: str | os.PathLike,
    *,
    base: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    tier: Tier = "device",
    cache_bytes: int | None = None,
) -> nn.Module:
    """The model with its memory, in eval mode.

    Args:
        base: the base model, when it is already in memory; otherwise it is loaded by the name in memory.json.
        dtype: of the base and the memory's parameters; rows keep the config's row_dtype.
        tier: "device" (trainable), or read only from "host" memory, from "disk" where the files lie, or "cached": from disk
            with hot rows in at most `cache_bytes` of memory a table. The answers are the same.

    Raises: CheckpointError for files that are missing, mixed or cut short, IdentityError for another base or addresses.
    """
    from engram_lm.attachment import attach

    directory = Path(directory)
    with _damage_named(directory):
        base = _with_memories(directory, base, dtype, attach)
        _load_memory(base, directory, row_state=False, tier=tier, cache_bytes=cache_bytes)
    return base.eval()


def _with_memories(
    directory: Path, base: nn.Module | None, dtype: torch.dtype | None, attach: Any
) -> nn.Module:
    """The base with the memories of memory.json, new."""
    manifest = read_manifest(directory)
    ref = BaseRef(**manifest["base"])
    kept = manifest["base_files"]
    if base is None and kept == "base":
        base = _base_beside(directory, dtype)
        require_own_base(directory, manifest, base, dtype=dtype)
    elif base is None:
        base = load_base(ref.name, dtype=dtype, report=lambda line: None).model
    if kept != "base":
        require_base(base, ref=ref)
    if kept == "adapter":
        from peft import PeftModel

        require_own_adapter(directory, manifest)
        with quiet_libraries():
            base = PeftModel.from_pretrained(base, str(directory / "adapter"))
    tokenizer = _tokenizer(directory)
    for entry in manifest["memories"]:
        config = MemoryConfig.from_json(entry["config"])
        token_map = TokenMap.load(directory / f"tokens-{config.name}.bin")
        token_map.require_tokenizer(tokenizer, where=str(directory))
        attach(base, tokenizer, config, token_map=token_map, base=ref)
    return base


def load_memory(model: nn.Module, directory: str | os.PathLike, *, row_state: bool = False) -> None:
    """Fill the memories already on `model` from `directory`. Nothing changes unless everything fits.

    row_state: also restore the row optimizers' state, as a checkpoint that training goes on from needs.
    """
    directory = Path(directory)
    with _damage_named(directory):
        _load_memory(model, directory, row_state=row_state)


def _load_memory(
    model: nn.Module,
    directory: Path,
    *,
    row_state: bool,
    tier: Tier = "device",
    cache_bytes: int | None = None,
) -> None:
    from engram_lm.attachment import _runtime

    runtime = _runtime(model)
    manifest = read_manifest(directory)
    saved = {entry["config"]["name"]: entry for entry in manifest["memories"]}
    if set(saved) != set(runtime.memories):
        raise CheckpointError(
            f"{directory} holds the memories {sorted(saved)}; the model has {sorted(runtime.memories)}."
        )
    parameters = read_tensors(
        directory / "memory.safetensors",
        manifest["save_id"],
        run=_runs_in(manifest),
        config=_config_hash(manifest["memories"]),
    )
    fill = []
    for name, memory in runtime.memories.items():
        for index, (slot, entry) in enumerate(zip(memory.slots, saved[name]["tables"], strict=True)):
            where = f"{directory} (memory {name!r}, block {entry['block']})"
            Identity(entry["identity_facts"]).require_equal(
                slot.scheme.identity, where=where, is_tokenizer=memory.token_map.is_of
            )
            rows = find_rows(
                directory, f"{name}-{entry['block']}", entry, slot, save_id=manifest["save_id"], tier=tier,
                cache_bytes=cache_bytes, row_state=row_state,
            )  # fmt: skip
            if rows.shape != (slot.table.n_rows, slot.table.width):
                raise CheckpointError(
                    f"{where}: the rows are {rows.shape}; the model's table is "
                    f"{(slot.table.n_rows, slot.table.width)}. Attach with the same rows_per_head and head_width."
                )
            prefix = f"{name}.{index}."
            weights = {k.removeprefix(prefix): v for k, v in parameters.items() if k.startswith(prefix)}
            wanted = {k: v for k, v in slot.state_dict().items() if k != RUN}
            if set(weights) != set(wanted) or any(weights[k].shape != wanted[k].shape for k in wanted):
                raise CheckpointError(f"{where}: memory.safetensors does not hold this layer's parameters.")
            updates = int(entry["updates"])
            if float(weights["handle"]) != float(torch.tensor(float(updates)).to(weights["handle"].dtype)):
                raise CheckpointError(
                    f"{where}: the weights carry {float(weights['handle']):.0f} row updates, {MANIFEST} says {updates}."
                )
            fill.append((slot, weights, rows, updates, int(entry.get("run", 0))))
    for slot, weights, rows, updates, run in fill:
        rows.put(slot, model)
        slot.load_state_dict(weights)
        slot.table.gradients.set_updates(updates, run=run)


def save_pretrained(model: nn.Module, save_directory: str | os.PathLike, **options: Any) -> None:
    """What `model.save_pretrained` does while memory is attached: `save_memory`, the base's files included when trained.

    Takes transformers' own options where they mean something here (`tokenizer`), and ignores `state_dict`,
    `safe_serialization` and `is_main_process`, which Trainer passes.
    """
    if options.pop("is_main_process", True):
        save_memory(model, save_directory, tokenizer=options.get("tokenizer"))


# ---- parts -----------------------------------------------------------------------------------------------------------


def read_manifest(directory: Path) -> dict[str, Any]:
    """memory.json, checked. CheckpointError when there is none, or it is of another format or a later version."""
    path = directory / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{directory} holds no memory: {MANIFEST} is missing.")
    try:
        manifest = json.loads(path.read_text(encoding="utf8"))
        form, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if form != FORMAT or version != VERSION:
        raise CheckpointError(
            f"{path} has format {form!r} version {version}; this build reads {FORMAT!r} version {VERSION}."
        )
    return manifest


def require_own_base(
    directory: Path, manifest: dict[str, Any], base: nn.Module, *, dtype: torch.dtype | None
) -> None:
    """CheckpointError unless `base`, read from base/ in `dtype`, is of memory.json's save. Older ones do not say."""
    wanted = manifest.get("base_files_sha256")
    # float16 rounds what the fingerprint reads
    if dtype != torch.float16 and wanted not in (None, fingerprint_of(base)):
        raise _other_save(directory / "base")


def require_own_adapter(directory: Path, manifest: dict[str, Any]) -> None:
    """CheckpointError unless adapter/ is of the save that memory.json is of. Older ones do not say."""
    if manifest.get("adapter_sha256") not in (None, _adapter_hash(directory)):
        raise _other_save(directory / "adapter")


def _other_save(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} belongs to another save than {MANIFEST}; copy the directory again, whole."
    )


def _adapter_hash(directory: Path) -> str:
    """sha256 of a LoRA adapter's weights."""
    path = directory / "adapter" / "adapter_model.safetensors"
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def _runs_in(manifest: dict[str, Any]) -> dict[str, int] | None:
    """The number of the training run of every layer, as memory.safetensors names layers; None in older memories."""
    tables = {
        f"{entry['config']['name']}.{index}": table.get("run")
        for entry in manifest["memories"]
        for index, table in enumerate(entry["tables"])
    }
    return None if None in tables.values() else tables


def _config_hash(entries: list[dict[str, Any]]) -> str:
    """sha256 of what the weights mean: a gate or a dilation edited in memory.json would load and answer wrongly."""
    configs = json.dumps([entry["config"] for entry in entries], sort_keys=True)
    return hashlib.sha256(configs.encode()).hexdigest()


@contextlib.contextmanager
def _damage_named(directory: Path) -> Iterator[None]:
    """A memory.json that was edited or cut short fails in many ways; all of them are one error."""
    try:
        yield
    except EngramError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{directory / MANIFEST} is damaged ({type(error).__name__}: {error}); copy the directory again, whole."
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _save_base(model: nn.Module, directory: Path, ref: BaseRef, base_files: BaseFiles) -> str | None:
    if hasattr(model, "peft_config"):
        if ref.kind == "scratch":
            raise CheckpointError(
                "A LoRA adapter refers to its base by name, and this base has none: save the base to a directory, load it "
                "from there, and attach again."
            )
        type(model).save_pretrained(model, directory / "adapter")
        return "adapter"
    changed = ref.kind == "scratch" or not ref.name or fingerprint_of(model) != ref.sha256
    if base_files == "never" and changed:
        raise CheckpointError(
            'The base model was trained, so its weights must be saved: use base_files="auto".'
        )
    if base_files == "always" or changed:
        state = {name: tensor for name, tensor in model.state_dict().items() if ".engram." not in f".{name}"}
        with quiet_libraries():
            type(model).save_pretrained(model, directory / "base", state_dict=state)
        return "base"
    return None


def _base_beside(directory: Path, dtype: torch.dtype | None) -> nn.Module:
    """The base that was saved with the memory; its tokenizer is the memory's."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet_libraries():
            return AutoModelForCausalLM.from_pretrained(directory / "base", dtype=dtype or "auto")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{directory / 'base'} cannot be read: {first}") from None


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError):
        raise CheckpointError(f"{directory} holds no tokenizer; it belongs to the memory.") from None
