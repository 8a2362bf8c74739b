"""Row addresses in torch, on whatever device the ids are: equal in every bit to `plain` and to the CPU kernel.

    on_gpu = DeviceAddresses(layer_1, device="cuda")
    address_BTC = on_gpu(ids_BT, previous_BP=previous_BP)       # int64 [B, T, C]
    on_gpu.check(ids_BT)                                        # separate: it waits for the device

Calls have no data-dependent branch and no synchronisation, so torch.compile(fullgraph=True) traces them and a CUDA
graph captures them. They therefore do not check ids: an id outside the vocabulary gives an address in the table that
means nothing. Check with `check`, once, where ids enter.

This is not a Module: there is nothing to train, save or cast. Dimension letters as in `plain`.
"""

import torch

from engram_lm.addressing.inputs import DEAD, refuse
from engram_lm.addressing.scheme import AddressScheme
from engram_lm.errors import TokenIdError


class DeviceAddresses:
    """One scheme's constants on one device. `to` makes another; the scheme itself stays in `scheme`."""

    def __init__(self, scheme: AddressScheme, *, device: torch.device | str = "cpu") -> None:
        self.scheme = scheme
        self.device = torch.device(device)
        profile = scheme.profile
        self._reach = scheme.max_order - 1
        self._orders, self._heads = profile.orders, profile.heads
        self._fill, self._eos_ids = scheme.fill_id, scheme.eos_ids
        self._dead_stops = "dead" in profile.stop
        self._multipliers = scheme.multipliers.tolist()
        self._moduli_C = torch.tensor(scheme.moduli.tolist(), dtype=torch.int64, device=self.device)
        self._offsets_C = torch.tensor(scheme.offsets.tolist(), dtype=torch.int64, device=self.device)
        self._weights_NC = torch.tensor(scheme.weights().tolist(), dtype=torch.int64, device=self.device)

    def to(self, device: torch.device | str) -> "DeviceAddresses":
        """The same scheme on another device."""
        return DeviceAddresses(self.scheme, device=device)

    def __call__(
        self,
        ids_BT: torch.Tensor,
        *,
        previous_BP: torch.Tensor | None = None,
        starts_BT: torch.Tensor | None = None,
        mask_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Row addresses int64 [B, T, C] of integer ids [B, T], or [T, C] of [T]; as `AddressScheme.addresses`."""
        if ids_BT.ndim == 1:
            rows = (None if each is None else each[None] for each in (previous_BP, starts_BT, mask_BT))
            return self._addresses(ids_BT[None], *rows)[0]
        return self._addresses(ids_BT, previous_BP, starts_BT, mask_BT)

    def carry(
        self,
        ids_BT: torch.Tensor,
        *,
        previous_BP: torch.Tensor | None = None,
        starts_BT: torch.Tensor | None = None,
        mask_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the next chunk needs as `previous_BP`: int64 [B, max_order - 1], -1 where nothing may be seen."""
        history_BX = self._history(ids_BT, previous_BP, mask_BT)
        T = ids_BT.shape[1]
        if starts_BT is not None:
            starts_BX = torch.nn.functional.pad(starts_BT.bool(), (self._reach, 0))
            # later[x]: how many documents start behind x.
            later_BX = starts_BX.sum(1, keepdim=True) - starts_BX.cumsum(1)
            history_BX = torch.where(later_BX > 0, DEAD, history_BX)
        return history_BX[:, T:]

    def check(
        self,
        ids_BT: torch.Tensor,
        *,
        previous_BP: torch.Tensor | None = None,
        mask_BT: torch.Tensor | None = None,
    ) -> None:
        """Raise TokenIdError for the first id outside the vocabulary. Waits for the device."""
        V = self.scheme.vocab_size
        for ids, mask, what in ((previous_BP, None, "Previous token id"), (ids_BT, mask_BT, "Token id")):
            if ids is None:
                continue
            bad = (ids < DEAD) | (ids >= V)
            if mask is not None:
                bad = bad & mask.bool()
            positions = bad.flatten().nonzero()
            if positions.numel():
                rows = ids if ids.ndim == 2 else ids[None]
                refuse(rows, int(positions[0]), vocab_size=V, what=what)

    def _history(
        self, ids_BT: torch.Tensor, previous_BP: torch.Tensor | None, mask_BT: torch.Tensor | None
    ) -> torch.Tensor:
        """Ids with exactly `reach` places before them, DEAD where there is no token."""
        if ids_BT.ndim != 2 or ids_BT.is_floating_point() or ids_BT.dtype == torch.bool:
            raise TokenIdError(
                f"ids are {ids_BT.dtype} of shape {tuple(ids_BT.shape)}; wanted integers [batch, tokens]."
            )
        ids_BT = ids_BT.long()
        if mask_BT is not None:
            ids_BT = torch.where(mask_BT.bool(), ids_BT, DEAD)
        known = 0 if previous_BP is None else previous_BP.shape[1]
        if known > self._reach:
            raise TokenIdError(
                f"previous ids have shape {tuple(previous_BP.shape)}; wanted at most {self._reach} a row."
            )
        if known:
            ids_BT = torch.cat([previous_BP.long(), ids_BT], dim=1)
        return torch.nn.functional.pad(ids_BT, (self._reach - known, 0), value=DEAD)

    def _addresses(
        self,
        ids_BT: torch.Tensor,
        previous_BP: torch.Tensor | None,
        starts_BT: torch.Tensor | None,
        mask_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        reach, fill, T = self._reach, self._fill, ids_BT.shape[1]
        history_BX = self._history(ids_BT, previous_BP, mask_BT)
        dead_BX = history_BX < 0
        token_BX = torch.where(dead_BX, fill, history_BX)
        # Places that look-back may not enter.
        wall_BX = dead_BX if self._dead_stops else torch.zeros_like(dead_BX)
        for eos in self._eos_ids:
            wall_BX = wall_BX | (token_BX == eos)
        starts_BX = None if starts_BT is None else torch.nn.functional.pad(starts_BT.bool(), (reach, 0))
        open_BT = ~dead_BX[:, reach:] if self._dead_stops else torch.ones_like(dead_BX[:, reach:])
        values = [token_BX[:, reach:]]
        for d in range(1, reach + 1):
            open_BT = open_BT & ~wall_BX[:, reach - d : reach - d + T]
            if starts_BX is not None:
                open_BT = open_BT & ~starts_BX[:, reach - d + 1 : reach - d + 1 + T]
            values.append(torch.where(open_BT, token_BX[:, reach - d : reach - d + T], fill))
        numbers_BTC = self._sums(values) if self.scheme.is_polynomial else self._mixes(values)
        # torch's remainder has the sign of the divisor, as NumPy's.
        return torch.remainder(numbers_BTC, self._moduli_C) + self._offsets_C

    def _mixes(self, values: list[torch.Tensor]) -> torch.Tensor:
        mix_BT = values[0] * self._multipliers[0]
        mixes = [mix_BT]
        for d in range(1, len(values)):
            mix_BT = mix_BT ^ (values[d] * self._multipliers[d])
            mixes.append(mix_BT)
        mix_BTO = torch.stack([mixes[order - 1] for order in self._orders], dim=-1)
        return mix_BTO.repeat_interleave(self._heads, dim=-1, output_size=len(self._orders) * self._heads)

    def _sums(self, values: list[torch.Tensor]) -> torch.Tensor:
        sum_BTC = values[0].unsqueeze(-1) * self._weights_NC[0]
        for d in range(1, len(values)):
            sum_BTC = sum_BTC + values[d].unsqueeze(-1) * self._weights_NC[d]
        return sum_BTC
