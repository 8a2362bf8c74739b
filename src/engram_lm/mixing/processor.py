"""Memory in transformers' `generate`: a logits processor, built anew for every call.

    processor = memory_processor(snapshot, gate, input_ids, attention_mask, tokenizer=tokenizer, model=model)
    output = model.generate(input_ids, attention_mask=attention_mask, logits_processor=[processor])
    processor.steps(output)                      # MemoryStep of every generated token

Where it stands (transformers 5.23, `_get_logits_processor`): after classifier-free guidance, sequence bias, repetition
penalties, no-repeat n-grams, bad words, minimum lengths, prefix constraints, forced and suppressed tokens; before
temperature, top-h/k/p, min-p, typical, epsilon, eta, watermark and `renormalize_logits`. So penalties weaken what the
model says, not what memory says; tokens forbidden outright (-inf) stay forbidden; temperature and cut-offs see the mixture.
Other processors in the same `logits_processor` list keep the order of that list.

Contexts come from `input_ids` at every step, so beams may be reordered, rows repeated (`num_return_sequences`) and
candidates of assisted decoding looked at. Padding is known from the attention mask of the prompt. A row where lambda is 0
or nothing is found keeps its bits. With session=4096 the last 4,096 tokens of a prompt and its output are looked up too, by
this prompt's rows alone (`session`). Needs torch; not transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from engram_lm.errors import ConfigError, StateError
from engram_lm.mixing.gate import Lambda
from engram_lm.mixing.identity import require_identity, rules_of
from engram_lm.mixing.mix import TokenRules
from engram_lm.mixing.mixer import MixedRow, Mixer
from engram_lm.mixing.session import SessionMemory
from engram_lm.mixing.trace import MemoryStep

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot


class MemoryProcessor:
    """See the module; made by `memory_processor`."""

    def __init__(
        self,
        snapshot: Snapshot,
        gate: Lambda,
        prompts: list[np.ndarray],
        prompt_length: int,
        rules: TokenRules,
        record: Literal["steps", "nothing"],
        most_verbatim: int | None = None,
        session: int | Literal["off"] = "off",
    ) -> None:
        self.snapshot, self.gate, self.rules = snapshot, gate, rules
        self.mixer = Mixer(gate, rules, most_verbatim=most_verbatim)
        self._prompts, self._prompt_length, self._record = prompts, prompt_length, record
        self._sessions: list[SessionMemory] = []
        if session != "off":
            self._sessions = [
                SessionMemory(snapshot, session, given=len(prompt), eos_id=rules.eos_id) for prompt in prompts
            ]
        self._buffers: list[list[np.ndarray]] = [[], []]
        self._turn = 0
        self._last: list[tuple[tuple[int, int], MixedRow]] = []
        self._steps: dict[tuple[int, int], MemoryStep] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of the next token after input_ids [N, T] -> logits of the mixture."""
        ids_NT = input_ids.detach().cpu().numpy()
        N, B = len(ids_NT), len(self._prompts)
        if N % B or ids_NT.shape[1] < self._prompt_length:
            raise StateError(
                f"This processor was built for {B} prompts of {self._prompt_length} tokens; generate has {N} rows of "
                f"{ids_NT.shape[1]}. Build one for every call, from the same input_ids."
            )
        if scores.shape[-1] != self.rules.n_logits:
            raise ConfigError(
                f"The model has {scores.shape[-1]:,} logits, the processor was built for {self.rules.n_logits:,}."
            )
        contexts = [
            np.concatenate([self._prompts[r // (N // B)], ids_NT[r, self._prompt_length :]]) for r in range(N)
        ]
        if self._record == "steps":
            self._close_steps(contexts)
        if not self.snapshot.n_tokens and not self._sessions:
            self._last = []
            return scores
        logits_NV = scores.detach().float().cpu().contiguous()
        self._turn ^= 1  # the buffers of the step before are still needed for its records
        out_NV = np.empty(logits_NV.shape, np.float32)
        generated, self._last = ids_NT.shape[1] - self._prompt_length, []
        for session in self._sessions:
            session.kept = max(session.kept, 2 * N // B)
        mixed = [
            self._row(r, self.seen_by(context, r // (N // B)), context, logits_NV[r], generated, out_NV[r])
            for r, context in enumerate(contexts)
        ]
        return torch.from_numpy(out_NV).to(scores.device, scores.dtype) if any(mixed) else scores

    def steps(self, sequences: Any) -> list[list[MemoryStep | None]]:
        """A record for every generated token of what `generate` returned; None where there is none: padding behind an
        end, and the last token of a beam that had ended before others did."""
        if self._record == "nothing":
            raise ConfigError('This processor was built with record="nothing".')
        ids_NT = torch.as_tensor(getattr(sequences, "sequences", sequences)).cpu().numpy()
        N, B, start = len(ids_NT), len(self._prompts), self._prompt_length
        contexts = [np.concatenate([self._prompts[r // (N // B)], ids_NT[r, start:]]) for r in range(N)]
        self._close_steps(contexts)
        found = []
        for context, row in zip(contexts, ids_NT, strict=True):
            n = len(context) - (len(row) - start)
            keys = [_key(context[: n + i + 1]) for i in range(len(row) - start)]
            found.append([self._steps.get(key) for key in keys])
        return found

    def seen_by(self, context: np.ndarray, prompt: int = 0) -> Snapshot:
        """What is looked up after a context, int [T], of a prompt: the index and, with a session memory, the conversation."""
        return self._sessions[prompt].extended(context) if self._sessions else self.snapshot

    def step_of(self, token_id: int) -> MemoryStep | None:
        """What memory did to the first row's newest token, once it was chosen; None where the index is empty."""
        if self._record == "nothing" or not self._last:
            return None
        (position, _), row = self._last[0]
        return row.step(token_id, position=position)

    # ---- inside -------------------------------------------------------------------------------------------------------

    def _row(
        self,
        r: int,
        snapshot: Snapshot,
        context: np.ndarray,
        logits_V: torch.Tensor,
        generated: int,
        out_V: np.ndarray,
    ) -> bool:
        """Write the mixture of one row; False where it is the model's own distribution, bit for bit."""
        buffers = self._buffers[self._turn]
        while len(buffers) <= r:
            buffers.append(np.empty(self.snapshot.vocab_size + 1, np.float32))
        row = self.mixer.row(
            snapshot, context, logits_V.numpy(), generated=generated, out=out_V, buffer=buffers[r]
        )
        if self._record == "steps":
            self._last.append((_key(context), row))
        return row.lam > 0

    def _close_steps(self, contexts: list[np.ndarray]) -> None:
        """Now that the chosen tokens are known, write the records of the step before."""
        before = dict(self._last)
        for context in contexts:
            row = before.get(_key(context[:-1])) if len(context) else None
            if row is not None:
                self._steps[_key(context)] = row.step(int(context[-1]), position=len(context) - 1)


def _key(context: np.ndarray) -> tuple[int, int]:
    return len(context), hash(np.ascontiguousarray(context, np.int64).tobytes())


def memory_processor(
    snapshot: Snapshot,
    gate: Lambda,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    tokenizer: Any = None,
    model: Any = None,
    rules: TokenRules | None = None,
    end: Literal["eos", "nothing"] = "eos",
    record: Literal["steps", "nothing"] = "steps",
    most_verbatim: int | None = None,
    session: int | Literal["off"] = "off",
) -> MemoryProcessor:
    """A processor for one call of `generate` with these input_ids, int [B, T], and this attention mask.

    tokenizer, model: of the call; the gate and the token rules are checked against and made from them, unless `rules`
    is given. end: whether the index's END speaks for the end-of-text token, so that memory can end a text.
    most_verbatim: where this many generated tokens in a row are a document's own, memory is silent for the next one; the
    model alone may go on. session: how many of the last tokens of a prompt and its output are looked up beside the index.
    """
    if most_verbatim is not None and most_verbatim < 1:
        raise ConfigError(f"most_verbatim is at least 1 token; got {most_verbatim}.")
    ids_BT = torch.as_tensor(input_ids)
    if ids_BT.dim() != 2 or ids_BT.shape[0] == 0:
        raise ConfigError(
            f"input_ids are [batch, tokens], at least one row; got shape {tuple(ids_BT.shape)}."
        )
    if rules is None:
        rules = rules_of(tokenizer, model, snapshot, end=end)
    require_identity(gate, tokenizer=tokenizer, model=model)
    keep_BT = torch.ones_like(ids_BT) if attention_mask is None else torch.as_tensor(attention_mask)
    if keep_BT.shape != ids_BT.shape:
        raise ConfigError(
            f"The attention mask has shape {tuple(keep_BT.shape)}, input_ids {tuple(ids_BT.shape)}."
        )
    rows, keep = ids_BT.cpu().numpy().astype(np.int64), keep_BT.cpu().numpy() != 0
    prompts = [row[kept] for row, kept in zip(rows, keep, strict=True)]
    return MemoryProcessor(snapshot, gate, prompts, rows.shape[1], rules, record, most_verbatim, session)
