"""What a language model says about texts and token ids: log-probabilities of tokens, logits, continuations.

    reader = ModelReader(model, tokenizer)
    ids = reader.encode("Alexander the Great")
    with torch.no_grad():
        reader.log_probs(ids)                           # float64 [T - 1], nats: log P of ids[1:]
        reader.continuations(ids, [[12, 7], [9]])       # of each: log P, and whether greedy decoding says it

All numbers come from float32 logits (or better), sequence by sequence, without padding before a scored token: they do not
depend on a batch size. The model is read as it stands: in which mode and with which memory is the caller's to say.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from engram_lm.attachment import memories
from engram_lm.errors import DataError, TokenIdError
from engram_lm.generation.prompts import PromptEncoder
from engram_lm.kvcache import cache_of, with_cache

logger = logging.getLogger(__name__)

# Continuations that are read together: their logits are as many rows as they have tokens.
_TOGETHER = 64


def token_losses(logits_NV: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """float64 [N], nats: -log P of each target, in float32 or better; 0 where the target is -100."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    return F.cross_entropy(logits_NV.to(wide), target_N, ignore_index=-100, reduction="none").double()


class ContinuationScore(NamedTuple):
    """log_p: nats of a whole continuation. greedy: whether the arg max at each of its tokens is that token."""

    log_p: float
    greedy: bool


class ModelReader:
    """See the module. name: how results call the model."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "model") -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.prompts = PromptEncoder(tokenizer)
        self.encoder = self.prompts.encoder
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        # None: to be found out. A control may read by what the forward begins with; then a prefix is no forward of its own
        self.caches: bool | None
        self.caches = False if any(memory.intervention for memory in memories(model).values()) else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """The most tokens that the model reads; None where it does not say."""
        config = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(config, "max_position_embeddings", None)

    # ---- text ---------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> np.ndarray:
        """int64 ids of a text, behind those that the tokenizer begins texts with. Special tokens spelled out are letters."""
        return np.array([*self.prompts.start, *self.encoder.encode(text)], np.int64)

    def pair(self, prompt: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """The text `prompt answer` (a space between) as ids of the prompt and of the rest.

        Cut where the prompt's own ids end; earlier where they differ from those of the whole text.
        """
        between = "" if not prompt or prompt[-1].isspace() else " "
        whole = self.encode(f"{prompt}{between}{answer}")
        alone = self.encode(prompt.rstrip() if between == "" else prompt)
        n = min(len(whole), len(alone))
        same = whole[:n] == alone[:n]
        cut = n if same.all() else int(same.argmin())
        if cut == 0 or cut == len(whole):
            raise DataError(
                f"The prompt {prompt!r} and the answer {answer!r} leave nothing to read or nothing to say."
            )
        return whole[:cut], whole[cut:]

    # ---- what it says -------------------------------------------------------------------------------------------

    def log_probs(self, ids: np.ndarray, *, since: int = 1) -> np.ndarray:
        """float64 [T - since], nats: log P of ids[since:], each after all ids before it. since is 1 or more."""
        if since < 1 or len(ids) <= since:
            raise TokenIdError(f"Log P is of the tokens after the first; got {len(ids)} ids from {since} on.")
        logits_TV = self.logits(ids, last=len(ids) - since)
        target_T = torch.as_tensor(np.ascontiguousarray(ids[since:]), device=self.device)
        return -token_losses(logits_TV, target_T).cpu().numpy()

    def logits(self, ids: np.ndarray, *, last: int) -> torch.Tensor:
        """[last, V] in the model's dtype, on its device: logits before each of the last `last` tokens of int64 ids [T]."""
        kept = {"logits_to_keep": last + 1} if self._keeps else {}
        ids_T = torch.as_tensor(np.ascontiguousarray(ids), dtype=torch.int64, device=self.device)
        return self.model(ids_T[None], use_cache=False, **kept).logits[0, -last - 1 : -1]

    def continuations(
        self, prompt: np.ndarray, continuations: Sequence[Sequence[int]]
    ) -> list[ContinuationScore]:
        """Each continuation after `prompt`: its log P, and whether greedy decoding says it.

        The prompt is read once, then the continuations beside each other from its cache; twin: `continuations_plain`.
        """
        if self.caches is None:
            self.caches = self._same_from_cache(prompt, continuations)
        said = self._from_cache(prompt, continuations) if self.caches else None
        return self.continuations_plain(prompt, continuations) if said is None else said

    def _from_cache(
        self, prompt: np.ndarray, continuations: Sequence[Sequence[int]]
    ) -> list[ContinuationScore] | None:
        """None where the model keeps no cache that can be dealt out to several continuations."""
        prompt_T = torch.as_tensor(np.ascontiguousarray(prompt), dtype=torch.int64, device=self.device)
        output = self.model(prompt_T[None], use_cache=True)
        cache = cache_of(output)
        if not hasattr(cache, "reorder_cache"):
            return None
        first_V = output.logits[:, -1:]
        said: list[ContinuationScore] = []
        for at in range(0, len(continuations), _TOGETHER):
            group = [torch.as_tensor(list(c), device=self.device) for c in continuations[at : at + _TOGETHER]]
            longest = max(len(c) for c in group)
            logits_NTV = first_V.expand(len(group), 1, -1)
            if longest > 1:
                read_NT = torch.stack([F.pad(c[:-1], (0, longest - len(c))) for c in group])
                mine = copy.deepcopy(cache)
                mine.reorder_cache(torch.zeros(len(group), dtype=torch.int64, device=self.device))
                more_NTV = self.model(read_NT, use_cache=True, **with_cache(self.model, mine)).logits
                logits_NTV = torch.cat([logits_NTV, more_NTV], 1)
            for c, logits_TV in zip(group, logits_NTV, strict=True):
                said.append(_said(logits_TV[: len(c)], c))
        return said

    def _same_from_cache(self, prompt: np.ndarray, continuations: Sequence[Sequence[int]]) -> bool:
        """Whether the longest continuation is as probable from a cache: some recurrent layers take single tokens only."""
        longest = max(continuations, key=len)
        found = self._from_cache(prompt, [longest, longest])
        plain = self.continuations_plain(prompt, [longest])[0].log_p
        rounding = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 2e-2
        same = found is not None and abs(found[1].log_p - plain) <= rounding * (1 + abs(plain))
        if not same:
            logger.warning(
                "%s cannot continue several ways from one cache: slower, prompts are read each time.",
                self.name,
            )
        return same

    def continuations_plain(
        self, prompt: np.ndarray, continuations: Sequence[Sequence[int]]
    ) -> list[ContinuationScore]:
        """`continuations`, each read with the whole prompt before it."""
        said = []
        for continuation in continuations:
            ids = np.concatenate([prompt, np.asarray(continuation, np.int64)])
            ids_T = torch.as_tensor(ids, device=self.device)
            logits_TV = self.model(ids_T[None], use_cache=False).logits[0]
            said.append(_said(logits_TV[len(prompt) - 1 : -1], ids_T[len(prompt) :]))
        return said


def _said(logits_TV: torch.Tensor, target_T: torch.Tensor) -> ContinuationScore:
    return ContinuationScore(
        -float(token_losses(logits_TV, target_T).sum()), bool((logits_TV.argmax(-1) == target_T).all())
    )
