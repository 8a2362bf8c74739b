"""One memory: its token map, address schemes, tables, and the layers that read them.

`Memory` is the plain object; `MemoryLayer` is the module that sits in the model and holds what autograd trains: the Engram
layer and the table's one-element handle. Rows are in neither's state_dict.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engram_lm.addressing import PROFILES, AddressScheme, Profile, resolve
from engram_lm.addressing.device import DeviceAddresses
from engram_lm.attachment.reading import Intervention
from engram_lm.attachment.structure import Decoder
from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, ModelError
from engram_lm.nn import EngramLayer, Window
from engram_lm.tables import DeviceTable, rule_from_json
from engram_lm.vocab import TokenMap

# Torch's name for what `get_extra_state` returns.
RUN = "_extra_state"


class MemoryLayer(EngramLayer):
    """The Engram layer before one block, with the handle of its table."""

    def __init__(
        self,
        *,
        scheme: AddressScheme,
        table: Any,
        block: int,
        token_map: TokenMap,
        dead_token_ids: tuple[int, ...] = (),
        **layer: Any,
    ) -> None:
        super().__init__(**layer)
        self.scheme, self.table, self.block = scheme, table, block
        self.handle = table.gradients.handle
        # of a control that looks nothing up, float [M, D]
        self.register_parameter("bias", None)
        self._prepare(token_map, dead_token_ids)

    def _prepare(self, token_map: Any, dead_token_ids: tuple[int, ...] = ()) -> None:
        """The token map and the scheme's constants on the layer's device, for compiled graphs and accelerators.

        Plain attributes, remade when the layer moves: buffers would be broadcast by DDP and cast by checkpoints.
        """
        device = self.key_norm.device
        if device.type == "meta":
            return
        canonical = np.append(token_map.canonical, -1)  # index -1, no token, stays DEAD
        canonical[list(dead_token_ids)] = -1
        self.canonical_of_raw = torch.from_numpy(canonical).to(device)
        self.on_device = DeviceAddresses(self.scheme, device=device)

    def _apply(self, *args: Any, **kwargs: Any) -> "MemoryLayer":
        super()._apply(*args, **kwargs)
        device = self.key_norm.device
        if device.type != "meta" and device != self.canonical_of_raw.device:
            self.canonical_of_raw = self.canonical_of_raw.to(device)
            self.on_device = self.on_device.to(device)
        return self

    def get_extra_state(self) -> Tensor:
        """The number of the training run that the rows come from: in a state_dict it stands beside the handle's count."""
        return torch.tensor([self.table.gradients.run])

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing here: it is the rows' number that counts, and `_load_from_state_dict` has the two compared."""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """A state_dict brings weights, never rows: the next forward compares their counts of updates and their runs."""
        if prefix + "handle" in state_dict:
            self.table.gradients.weights_were_loaded(state_dict.get(prefix + RUN))
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing = args[2]
        if prefix + RUN in missing:  # of weights that were saved before there was such a number
            missing.remove(prefix + RUN)

    def extra_repr(self) -> str:
        return f"block={self.block}, rows={self.table.n_rows}x{self.table.width}"


class Memory:
    """A memory on a model; made by `attach`."""

    def __init__(
        self,
        config: MemoryConfig,
        token_map: TokenMap,
        schemes: tuple[AddressScheme, ...],
        slots: nn.ModuleList,
    ):
        self.config, self.token_map, self.schemes, self.slots = config, token_map, schemes, slots
        self.enabled = True
        # what is read in place of its own addresses and rows, see attachment.reading
        self.reading: Intervention | None = None
        self._dead = np.array(config.dead_token_ids, dtype=np.int64)

    def __deepcopy__(self, memo: dict) -> "Memory":
        """Rows and parameters are copied; the token map and the schemes cannot change and are shared."""
        twin = Memory(self.config, self.token_map, self.schemes, copy.deepcopy(self.slots, memo))
        memo[id(self)] = twin
        twin.enabled, twin.reading = self.enabled, self.reading
        return twin

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def tables(self) -> list[Any]:
        return [slot.table for slot in self.slots]

    @property
    def keep(self) -> int:
        """Past tokens that a forward needs: the look-back of the hash, and of the conv."""
        return max(max(slot.scheme.max_order - 1, slot.past_length) for slot in self.slots)

    def canonical(self, ids_BS: Tensor) -> np.ndarray:
        """Raw ids (-1: no token) to canonical ids on the CPU; TokenIdError for an id outside the vocabulary."""
        ids = ids_BS.detach().to("cpu", torch.int64).numpy()
        canonical = self.token_map.canonical_of(ids)
        if len(self._dead):
            canonical[np.isin(ids, self._dead)] = -1
        return canonical

    def addresses(self, window: Window) -> list[Tensor]:
        """int64 [B, T, C] for every slot, for the window's chunk.

        On the CPU where the rows lie there, from one copy of the ids for all such slots: a copy of addresses would be
        columns times as long, and one a slot. Otherwise on the device of the ids.
        """
        found = self._own_addresses(window)
        if self.reading is None:
            return found
        return [self.reading.addresses(slot, one) for slot, one in zip(self.slots, found, strict=True)]

    def _own_addresses(self, window: Window) -> list[Tensor]:
        if torch.compiler.is_compiling():
            return [self._address_on_device(slot, window) for slot in self.slots]
        near = [_ids_on_cpu(window) or _rows_on_cpu(slot.table) for slot in self.slots]
        if not any(near):
            return [self._address_on_device(slot, window) for slot in self.slots]
        on_cpu = _window_on_cpu(window)
        canonical_BS = self.canonical(on_cpu.ids_BS)
        return [
            self._address_on_cpu(slot, on_cpu, canonical_BS)
            if here
            else self._address_on_device(slot, window)
            for slot, here in zip(self.slots, near, strict=True)
        ]

    def _address_on_cpu(self, slot: MemoryLayer, window: Window, canonical_BS: np.ndarray) -> Tensor:
        scheme = slot.scheme
        if window.take_BT is not None:
            return window.chunk_of(torch.from_numpy(scheme.addresses(canonical_BS)))
        n_past = canonical_BS.shape[1] - window.n_chunk
        return torch.from_numpy(
            scheme.addresses(
                canonical_BS[:, n_past:],
                previous_BP=canonical_BS[:, max(0, n_past - scheme.max_order + 1) : n_past],
                starts_BT=None if window.starts_BT is None else window.starts_BT.numpy(),
            )
        )

    def _address_on_device(self, slot: MemoryLayer, window: Window) -> Tensor:
        # documents are packed without a cache alone, so starts and window have one length
        address_BSC = slot.on_device(slot.canonical_of_raw[window.ids_BS], starts_BT=window.starts_BT)
        return window.chunk_of(address_BSC)


def _ids_on_cpu(window: Window) -> bool:
    return window.ids_BS.device.type == "cpu"


def _rows_on_cpu(table: Any) -> bool:
    """Whether a table is read on the CPU. One that does not say is asked with addresses where the ids are."""
    device = getattr(table, "device", None)
    return device is not None and torch.device(device).type == "cpu"


def _window_on_cpu(window: Window) -> Window:
    """What addresses need of a window, on the CPU. Waits for the device; copies nothing that is there already."""
    on_cpu = Window(window.ids_BS.cpu(), window.n_chunk, state=None)
    on_cpu.take_BT = None if window.take_BT is None else window.take_BT.cpu()
    on_cpu.starts_BT = None if window.starts_BT is None else window.starts_BT.cpu()
    return on_cpu


def profile_of(config: MemoryConfig) -> Profile:
    """The profile that a config names, with the config's own values in place."""
    if isinstance(config.profile, str):
        if config.profile not in PROFILES:
            raise ConfigError(
                f"Unknown profile {config.profile!r}; this build has {', '.join(sorted(PROFILES))}."
            )
        profile = PROFILES[config.profile]
    else:
        profile = Profile.from_dict(config.profile)
    changes = {
        field: getattr(config, field)
        for field in (
            "orders",
            "heads",
            "rows_per_head",
            "head_width",
            "seed",
            "gate",
            "conv_kernel",
            "conv_dilation",
        )
        if getattr(config, field) is not None
    }
    if "orders" in changes and "conv_dilation" not in changes and profile.conv_kernel:
        changes["conv_dilation"] = max(changes["orders"])  # the released rule: dilation is the highest order
    return profile.replace(**changes) if changes else profile


def build_memory(
    config: MemoryConfig, decoder: Decoder, tokenizer: Any, *, token_map: TokenMap | None, like: Tensor
) -> Memory:
    """Memory with zero rows for `decoder`; parameters take dtype and device of `like`."""
    profile = profile_of(config)
    if profile.fusion != "gate":
        raise ConfigError(
            f"Profile {profile.name!r} averages rows into the token embedding, which changes any model that was not trained "
            "with it. Use engram_lm.nn.EmbeddingMean in such a model; attach offers gated profiles."
        )
    if max(config.layers) >= len(decoder.blocks):
        raise ConfigError(
            f"layers names block {max(config.layers)}, but the model has blocks 0 to {len(decoder.blocks) - 1}."
        )
    if token_map is None:
        if tokenizer is None:
            raise ModelError("attach needs the model's tokenizer: it decides which tokens share an address.")
        make = TokenMap.from_tokenizer if profile.id_space == "canonical" else TokenMap.raw
        token_map = make(tokenizer, raw_size=_raw_size(tokenizer, decoder.vocab_size))
    schemes = resolve(
        profile,
        vocab_size=token_map.size,
        layers=config.layers,
        fill_id=_fill_id(config, profile, tokenizer, token_map),
        eos_ids=_eos_ids(profile, tokenizer, token_map),
        token_map_hash=token_map.fingerprint if profile.id_space == "canonical" else None,
        tokenizer_fingerprint=token_map.tokenizer_fingerprint,
    )
    outside = [token for token in config.dead_token_ids if not 0 <= token < token_map.raw_size]
    if outside:
        raise ConfigError(
            f"dead_token_ids names {outside[0]}; the tokenizer has ids 0 to {token_map.raw_size - 1}."
        )
    slots = nn.ModuleList()
    for scheme, block in zip(schemes, config.layers, strict=True):
        table = DeviceTable(
            n_rows=scheme.padded_rows,
            width=profile.head_width,
            dtype=getattr(torch, config.row_dtype),
            rule=rule_from_json(config.rule),
            name=f"{config.name} at block {block}",
        )
        slots.append(
            MemoryLayer(
                scheme=scheme,
                table=table,
                block=block,
                token_map=token_map,
                dead_token_ids=config.dead_token_ids,
                hidden_size=decoder.hidden_size,
                memory_width=len(scheme.moduli) * profile.head_width,
                branches=decoder.branches,
                conv_kernel=profile.conv_kernel,
                conv_dilation=profile.conv_dilation or 1,
                gate_form=profile.gate,
                projection_bias=profile.projection_bias,
                eps=decoder.eps,
                device=like.device,
                dtype=like.dtype,
            )
        )
    return Memory(config, token_map, schemes, slots)


def _raw_size(tokenizer: Any, vocab_size: int) -> int:
    """Embedding rows may exceed the tokenizer's ids (padding of the matrix) and, rarely, the other way round."""
    return max(vocab_size, TokenMap.raw(tokenizer).raw_size)


def _fill_id(config: MemoryConfig, profile: Profile, tokenizer: Any, token_map: TokenMap) -> int | None:
    if profile.fill != "pad":
        if config.fill_token_id is not None:
            raise ConfigError(
                f"fill_token_id has no effect: profile {profile.name!r} fills with {profile.fill!r}."
            )
        return None
    raw = config.fill_token_id
    for name in ("pad_token_id", "eos_token_id"):
        raw = getattr(tokenizer, name, None) if raw is None else raw
    if raw is None:
        raise ConfigError("The tokenizer has neither a pad nor an EOS token; give fill_token_id.")
    return int(token_map.canonical_of([raw])[0])


def _eos_ids(profile: Profile, tokenizer: Any, token_map: TokenMap) -> tuple[int, ...]:
    if "eos" not in profile.stop and profile.fill != "eos":
        return ()
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        raise ConfigError(f"Profile {profile.name!r} stops at EOS, but the tokenizer has no EOS token.")
    return (int(token_map.canonical_of([eos])[0]),)
