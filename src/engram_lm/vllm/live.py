"""An index that is followed while it changes, and one decoding step of many rows mixed with it. NumPy and torch; no vLLM.

    live = Live(settings, tokenizer=tokenizer, n_logits=49_152, eos_id=2, model=lambda: sha256)
    live.step(logits_RV, [Row(at=0, last=tokens, generated=3, part=live.part(options)), ...])

Every step looks at the newest generation of the index (one stat of a file): a document that was added while a request
runs is known to its next token, one that was deleted has no part in it. If the index cannot be read (its directory
is gone, a file is damaged), requests are answered without memory until it can be; that is logged once, as an error.
Nothing here raises because of what a request holds: an exception would end vLLM's engine for all of them.

R: rows of the step (requests, or their drafts); V: logits; M: tokens of the index, M <= V
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engram_lm.errors import ConfigError, EngramError
from engram_lm.index.store import Index
from engram_lm.mixing.gate import FixedLambda, Gate, Lambda, default_gate
from engram_lm.mixing.lookups import Lookups, read_next
from engram_lm.mixing.mix import mix, token_rules
from engram_lm.mixing.mixer import Mixer, survey_of
from engram_lm.vllm.options import RequestOptions, Settings

if TYPE_CHECKING:
    import torch

    from engram_lm.index.snapshot import Snapshot

_LOG = logging.getLogger("engram_lm.vllm")
# of the documents that one request may name, together: about a second of sorting
MOST_TOKENS = 2**21
_MOST_RESTRICTED = 64


class Part(NamedTuple):
    """What memory is to a request: whose documents, which of them (None: all), and its own lambda (None: the server's)."""

    tenants: tuple[str, ...]
    documents: tuple[str, ...] | None
    lam: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the logits. at: its place; last: the last tokens before it, at least `Live.max_order` where there are as
    many, int; generated: how many tokens before it are output."""

    at: int
    last: np.ndarray
    generated: int
    part: Part


class Live:
    """See the module. Errors in settings, index, gate or tokenizer are raised here, when the server starts."""

    def __init__(
        self,
        settings: Settings,
        *,
        tokenizer: Any,
        n_logits: int,
        eos_id: int | None,
        model: Callable[[], str],
    ) -> None:
        from engram_lm.library.encoding import encoder_of
        from engram_lm.mixing.identity import as_the_gate_says

        self.settings, self.gate = settings, _gate_of(settings)
        check = settings.model == "check" and bool(getattr(self.gate, "model", ""))
        self.gate.require(tokenizer=as_the_gate_says(self.gate, tokenizer), model=model() if check else None)
        self.store = Index.open(settings.index)
        encoder_of(self.store, tokenizer)
        self.rules = token_rules(tokenizer, n_logits=n_logits, n_tokens=self.store.vocab_size, eos_id=eos_id)
        self._fixed: dict[float, FixedLambda] = {}
        # part of the index -> (snapshot of all it was made from, snapshot)
        self._restricted: dict[Any, tuple[Snapshot, Snapshot]] = {}
        self._buffers: list[np.ndarray] = []
        self._down = ""
        self.snapshot(settings.tenants or ())

    @property
    def max_order(self) -> int:
        """How many tokens before a row memory looks at."""
        return self.gate.reading.max_order

    def part(self, options: RequestOptions) -> Part | None:
        """What memory is to a request with these options; None where it is nothing. A token that is not good is nothing
        too: requests with one are refused before they come here, wherever that process knows the key."""
        if (self.settings.lam if options.lam is None else options.lam) == 0:
            return None
        try:
            tenants = self.settings.tenants_for(options)
        except ConfigError as error:
            _LOG.warning("A request without memory: %s", error)
            return None
        return Part(tenants, options.documents, options.lam) if tenants else None

    def snapshot(self, tenants: tuple[str, ...]) -> Snapshot | None:
        """The newest generation of these tenants; None where the index cannot be read now."""
        try:
            found = self.store.snapshot(tenants)
        except (EngramError, OSError) as error:
            if str(error) != self._down:
                _LOG.error("No memory until the index can be read again: %s", error)
            self._down = str(error)
            return None
        if self._down:
            _LOG.warning("The index %s is read again.", self.settings.index)
            self._down = ""
        return found

    def step(self, logits_RV: torch.Tensor, rows: list[Row]) -> None:
        """Mix memory into these rows, in place; float32. A row where lambda is 0 or nothing is found keeps its bits."""
        groups: dict[Part, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.part, []).append(row)
        for part, group in groups.items():
            snapshot = self.snapshot(part.tenants)
            if snapshot is not None and part.documents is not None:
                snapshot = self._only(snapshot, part)
            if snapshot is not None and snapshot.n_tokens:
                self._mix(logits_RV, group, snapshot, self._lambda(part.lam))

    # ---- inside -------------------------------------------------------------------------------------------------------

    def _mix(self, logits_RV: torch.Tensor, rows: list[Row], snapshot: Snapshot, gate: Lambda) -> None:
        while len(self._buffers) < len(rows):
            self._buffers.append(np.empty(self.store.vocab_size + 1, np.float32))
        read = [
            read_next(snapshot, row.last, self.rules, gate.reading, out=out)
            for row, out in zip(rows, self._buffers, strict=False)
        ]
        q_R, memory = [q for q, _ in read], _joined([found for _, found in read])
        generated = np.array([row.generated for row in rows])
        mixer = Mixer(gate, self.rules, most_verbatim=self.settings.most_verbatim)

        def lambdas(survey_R6: np.ndarray) -> np.ndarray:
            return mixer.lambdas(memory, survey_R6, tokens=snapshot.n_tokens, generated=generated)

        at = [row.at for row in rows]
        (mix_here if logits_RV.device.type == "cpu" else mix_there)(logits_RV, at, q_R, memory.top, lambdas)

    def _lambda(self, lam: float | None) -> Lambda:
        if lam is None:
            return self.gate
        if len(self._fixed) > 1000:
            self._fixed.clear()
        return self._fixed.setdefault(lam, FixedLambda(lam, reading=self.gate.reading))

    def _only(self, whole: Snapshot, part: Part) -> Snapshot:
        """Those of the documents that there are in this generation, sorted anew, once for all steps until the next one.

        A document nobody has contributes nothing; too many tokens together are none, since sorting them stops the engine.
        """
        key, documents = part[:2], part.documents or ()
        made_from, found = self._restricted.pop(key, (None, None))
        if made_from is not whole or found is None:
            sizes = {}
            for name in documents:
                for view in whole.views:
                    if (number := view.number_of(name)) >= 0:
                        sizes[name] = len(view.segment.document_tokens(number))
            if (n := sum(sizes.values())) > MOST_TOKENS:
                _LOG.warning(
                    "A request without memory: it names documents of %s tokens, at most %s.", n, MOST_TOKENS
                )
                sizes = {}
            found = whole.restricted(list(sizes))
        self._restricted[key] = (whole, found)
        while len(self._restricted) > _MOST_RESTRICTED:
            del self._restricted[next(iter(self._restricted))]
        return found


def mix_here(
    logits_RV: torch.Tensor,
    at: list[int],
    q_R: list[np.ndarray],
    top_R: np.ndarray,
    lambdas: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Rows `at` of logits in this machine's memory, float32, by the compiled one-pass kernels."""
    rows = [logits_RV[r].numpy() for r in at]
    survey_R6 = np.zeros((len(rows), 6))
    for i, (x_V, top) in enumerate(zip(rows, top_R.tolist(), strict=True)):
        survey_R6[i] = survey_of(x_V, top)[0]
    # not into the logits themselves: compiled code that may overwrite what it reads is eight times slower
    out_V = np.empty(logits_RV.shape[1], np.float32)
    for x_V, q_M, lam, lse in zip(
        rows, q_R, lambdas(survey_R6).tolist(), survey_R6[:, 5].tolist(), strict=True
    ):
        if lam:
            mix(x_V, q_M, lam=lam, out=out_V, lse=lse)
            x_V[:] = out_V


def mix_there(
    logits_RV: torch.Tensor,
    at: list[int],
    q_R: list[np.ndarray],
    top_R: np.ndarray,
    lambdas: Callable[[np.ndarray], np.ndarray],
) -> None:
    """The same in torch, on the logits' device: logits never leave it, six numbers a row come back, q goes there."""
    import torch

    from engram_lm.mixing.on_device import mix_rows

    device = logits_RV.device
    at_R = torch.tensor(at, device=device)
    x_RV = logits_RV.index_select(0, at_R)
    top_device_R = torch.from_numpy(top_R.astype(np.int64)).to(device)
    most_R, place_R = x_RV.max(dim=-1)
    lse_R = x_RV.logsumexp(dim=-1)
    p_RV = (x_RV - lse_R[:, None]).exp()
    entropy_R = lse_R - torch.where(p_RV > 0, p_RV * x_RV, 0.0).sum(-1)
    of_top_R = x_RV.gather(1, top_device_R.clamp(min=0)[:, None])[:, 0] - lse_R
    of_top_R = torch.where(top_device_R >= 0, of_top_R, -torch.inf)
    numbers = (torch.zeros_like(lse_R), of_top_R, entropy_R, most_R - lse_R, place_R, lse_R)
    survey_R6 = torch.stack([number.double() for number in numbers], dim=1).cpu().numpy()
    lam_R = lambdas(survey_R6)
    used = np.flatnonzero(lam_R)
    if not len(used):
        return
    q_RM = torch.from_numpy(np.stack([q_R[r] for r in used])).to(device)
    used_R = torch.from_numpy(used).to(device)
    lam_R1 = torch.from_numpy(lam_R[used].astype(np.float32)).to(device)[:, None]
    out_RV = mix_rows(x_RV[used_R], lse_R[used_R][:, None], q_RM, lam_R1)
    logits_RV.index_copy_(0, at_R[used_R], out_RV)


def _gate_of(settings: Settings) -> Lambda:
    if settings.lam is not None:
        return FixedLambda(settings.lam)
    named = str(settings.gate)
    return (
        Gate.load(named)
        if Path(named).exists() or Path(named).name != Path(named).stem
        else default_gate(named)
    )


def _joined(memories: list[Lookups]) -> Lookups:
    names = [field.name for field in fields(Lookups) if field.name != "p"]
    return Lookups(**{name: np.concatenate([getattr(m, name) for m in memories]) for name in names})
