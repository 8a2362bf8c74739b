"""Ways of running a language model that must give the numbers of its own full forward, and ways to break the state.

A way is a function of (model, ids [3, 20]) that runs the model that way and returns how far the logits (beam search: also
the scores; checkpointing: the gradients) are from those of whole forwards of the same model over plain, unpadded
sequences without a cache. The same function runs on the bare model and on the one with memory.

    outcome = run(WAYS["chunks of 3"], model, ids)
    with broken("conv forgotten"): assert run(...).error > 1e-2
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, StaticCache

from engram_lm.attachment import memories, runtime
from engram_lm.errors import EngramError
from engram_lm.nn import ABSENT, MemoryState, Window, layer
from engram_lm.tables import DeviceTable, forget_pending
from models import EOS, PAD


@dataclass(frozen=True)
class Outcome:
    """error: greatest difference; scale: greatest |logit| (or 1 for gradients); raised: the exception instead."""

    error: float = float("nan")
    scale: float = 1.0
    raised: Exception | None = None


@dataclass(frozen=True)
class Way:
    name: str
    run: Callable[[nn.Module, Tensor], Outcome]
    broken_by: tuple[str, ...]
    compiled: bool = False
    gradients: bool = False


WAYS: dict[str, Way] = {}


def way(name: str, *broken_by: str, **kind: bool) -> Callable:
    def register(function: Callable) -> Callable:
        WAYS[name] = Way(name, function, broken_by, **kind)
        return function

    return register


def text(*, n_tokens: int = 20, vocab_size: int = 258, seed: int = 0) -> Tensor:
    """int64 [3, n_tokens]: random ids with a repeated stretch and an EOS inside."""
    ids = torch.randint(2, vocab_size, (3, n_tokens), generator=torch.Generator().manual_seed(seed))
    ids[:, 9:12] = ids[:, 2:5]
    ids[1, 7] = ids[2, 3] = EOS
    return ids


# ---- running and judging a cell --------------------------------------------------------------------------------------


def run(chosen: Way, model: nn.Module, ids: Tensor) -> Outcome:
    """The way's outcome; an exception is an outcome too."""
    in_float64 = next(model.parameters()).dtype == torch.float64 and not (chosen.compiled or chosen.gradients)
    with KeepFloat64() if in_float64 else contextlib.nullcontext(), torch.set_grad_enabled(chosen.gradients):
        try:
            return chosen.run(model, ids)
        except Exception as error:
            return Outcome(raised=error)


class KeepFloat64(TorchFunctionMode):
    """Models and `generate` compute some things in float32 whatever their dtype; here these stay float64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            return args[0].double()
        if func in (Tensor.to, Tensor.type, torch.zeros, torch.softmax, torch.nn.functional.softmax):
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in kwargs.items()}
        return func(*args, **kwargs)


def passes(outcome: Outcome, dtype: torch.dtype) -> bool:
    """Whether the bare model answers right this way, by its own measure: float noise and nothing more."""
    return outcome.raised is None and outcome.error <= (
        1e-9 if dtype == torch.float64 else 1e-3 * outcome.scale
    )


def tolerance(ours: Outcome, bare: Outcome, dtype: torch.dtype, *, times: float = 2.0) -> float:
    """float64: 1e-9. float32: `times` the bare model's own error here, or the floor that logits' own rounding sets."""
    if dtype == torch.float64:
        return 1e-9
    return max(times * bare.error, 2e-5 * max(1.0, ours.scale / 8))


def verdict(ours: Outcome, bare: Outcome, dtype: torch.dtype, *, times: float = 2.0) -> str:
    """One of: pass; both raise X; raises X where bare raises Y; bare is wrong, raises X; or a text beginning with WRONG."""
    raised = None if ours.raised is None else type(ours.raised).__name__
    if bare.raised is not None:
        if ours.raised is None:
            return f"WRONG: bare raises {type(bare.raised).__name__}, with memory it answers"
        if type(ours.raised) is type(bare.raised):
            return f"both raise {raised}"
        vague = (AttributeError, AssertionError, KeyError, IndexError, TypeError)
        clear = isinstance(ours.raised, EngramError) or not isinstance(ours.raised, vague)
        told = f"raises {raised} where bare raises {type(bare.raised).__name__}"
        return told if clear else f"WRONG: {told}"
    if not passes(bare, dtype):
        return (
            f"bare is wrong, raises {raised}" if raised else "WRONG: bare is wrong, and memory does not raise"
        )
    if raised:
        return f"WRONG: bare passes, with memory {raised}: {ours.raised}"
    limit = tolerance(ours, bare, dtype, times=times)
    return "pass" if ours.error <= limit else f"WRONG: off by {ours.error:.1e}, allowed {limit:.1e}"


# ---- helpers of the ways ---------------------------------------------------------------------------------------------


def full(model: nn.Module, ids: Tensor) -> Tensor:
    """The reference: one forward, nothing padded, no cache."""
    return model(ids, use_cache=False).logits


def compare(got: Tensor, want: Tensor) -> Outcome:
    assert got.shape == want.shape, (got.shape, want.shape)
    error = float((got - want).abs().max())
    return Outcome(error=error if error == error else float("inf"), scale=float(want.abs().max()))


def worst(outcomes: list[Outcome]) -> Outcome:
    return Outcome(error=max(o.error for o in outcomes), scale=max(o.scale for o in outcomes))


def in_chunks(
    model: nn.Module, ids: Tensor, size: int, cache: Any, *, start: int = 0, **kwargs: Any
) -> Tensor:
    """Logits of ids[:, start:], `size` tokens a forward, on `cache`."""
    parts = []
    for begin in range(start, ids.shape[1], size):
        end = min(begin + size, ids.shape[1])
        parts.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True, **kwargs).logits)
    return torch.cat(parts, 1)


def new_cache(model: nn.Module) -> DynamicCache:
    return DynamicCache(config=model.config)


def static(model: nn.Module, n_tokens: int = 32) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=n_tokens)


LENGTHS = (20, 13, 6)


def padded(ids: Tensor, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and positions of a batch whose rows have LENGTHS tokens, padded on one side."""
    rows, mask = torch.full_like(ids, PAD), torch.zeros_like(ids)
    for b, length in enumerate(LENGTHS):
        place = slice(ids.shape[1] - length, None) if side == "left" else slice(0, length)
        rows[b, place], mask[b, place] = ids[b, :length], 1
    return rows, mask, (mask.cumsum(1) - 1).clamp_min(0)


def compare_rows(model: nn.Module, logits: Tensor, ids: Tensor, mask: Tensor) -> Outcome:
    """The real places of a padded batch against each row's own full forward."""
    return worst(
        [
            compare(logits[b][mask[b].bool()], full(model, ids[b : b + 1, :n])[0])
            for b, n in enumerate(LENGTHS)
        ]
    )


def generate(model: nn.Module, ids: Tensor, n_new: int = 6, **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": n_new, "pad_token_id": PAD} | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)


def compare_generated(model: nn.Module, out: Any, n_prompt: int) -> Outcome:
    """The logits of every step, and the choice of every token, against one full forward over what came out."""
    want = full(model, out.sequences)[:, n_prompt - 1 : -1]
    got = torch.stack(out.logits, 1).to(want.dtype)
    chosen = torch.equal(want.argmax(-1), out.sequences[:, n_prompt:])
    outcome = compare(got, want)
    return outcome if chosen else Outcome(error=max(outcome.error, 1.0), scale=outcome.scale)


# ---- pieces of a sequence --------------------------------------------------------------------------------------------


@way("one token a step", "ids forgotten", "conv forgotten")
def one_token_a_step(model: nn.Module, ids: Tensor) -> Outcome:
    return compare(in_chunks(model, ids, 1, new_cache(model)), full(model, ids))


def _register_chunks(size: int) -> None:
    @way(f"chunks of {size}", "ids forgotten", "conv forgotten")
    def chunks(model: nn.Module, ids: Tensor) -> Outcome:
        return compare(in_chunks(model, ids, size, new_cache(model)), full(model, ids))


for _size in (3, 4, 7):
    _register_chunks(_size)


@way("cache built lazily", "ids forgotten", "conv forgotten")
def lazy_cache(model: nn.Module, ids: Tensor) -> Outcome:
    """`DynamicCache()`: layers appear as they are first used."""
    return compare(in_chunks(model, ids, 4, DynamicCache()), full(model, ids))


@way("the model's own cache", "ids forgotten", "conv forgotten")
def own_cache(model: nn.Module, ids: Tensor) -> Outcome:
    first = model(ids[:, :9], use_cache=True)
    rest = in_chunks(model, ids, 5, first.past_key_values, start=9)
    return compare(torch.cat([first.logits, rest], 1), full(model, ids))


@way("positions given", "ids forgotten", "conv forgotten")
def positions_given(model: nn.Module, ids: Tensor) -> Outcome:
    cache, place = new_cache(model), torch.arange(ids.shape[1])[None]
    cuts = [(0, 6), (6, 7), (7, 15), (15, 20)]
    parts = [
        model(ids[:, a:b], position_ids=place[:, a:b], past_key_values=cache, use_cache=True).logits
        for a, b in cuts
    ]
    return compare(torch.cat(parts, 1), full(model, ids))


# ---- rows of the cache -----------------------------------------------------------------------------------------------


def _continue(model: nn.Module, ids: Tensor, change: Callable, rows: Tensor, cache: Any) -> Outcome:
    """Nine tokens, then `change` to the cache, then the rest of the rows that it should now hold."""
    in_chunks(model, ids[:, :9], 9, cache)
    change(cache)
    return compare(in_chunks(model, ids[rows], 1, cache, start=9), full(model, ids[rows])[:, 9:])


@way("rows reordered", "rows stay", "ids forgotten", "conv forgotten")
def rows_reordered(model: nn.Module, ids: Tensor) -> Outcome:
    rows = torch.tensor([2, 0, 0])
    return _continue(model, ids, lambda cache: cache.reorder_cache(rows), rows, new_cache(model))


@way("rows repeated", "rows stay", "ids forgotten", "conv forgotten")
def rows_repeated(model: nn.Module, ids: Tensor) -> Outcome:
    rows = torch.arange(3).repeat_interleave(2)
    return _continue(model, ids, lambda cache: cache.batch_repeat_interleave(2), rows, new_cache(model))


@way("rows selected", "rows stay", "ids forgotten", "conv forgotten")
def rows_selected(model: nn.Module, ids: Tensor) -> Outcome:
    rows = torch.tensor([2, 1])
    return _continue(model, ids, lambda cache: cache.batch_select_indices(rows), rows, new_cache(model))


@way("cache copied", "ids forgotten", "conv forgotten")
def cache_copied(model: nn.Module, ids: Tensor) -> Outcome:
    """One prompt, two continuations on two copies, in turns."""
    cache, other = new_cache(model), ids.flip(1)
    in_chunks(model, ids[:, :9], 9, cache)
    twin, parts = copy.deepcopy(cache), ([], [])
    swapped = torch.cat([ids[:, :9], other[:, 9:]], 1)
    for t in range(9, ids.shape[1]):
        parts[0].append(model(ids[:, t : t + 1], past_key_values=cache).logits)
        parts[1].append(model(swapped[:, t : t + 1], past_key_values=twin).logits)
    return worst(
        [compare(torch.cat(p, 1), full(model, x)[:, 9:]) for p, x in zip(parts, (ids, swapped), strict=True)]
    )


# ---- length of the cache ---------------------------------------------------------------------------------------------


@way("cropped, then otherwise", "crop ignored", "crop takes the front", "ids forgotten", "conv forgotten")
def cropped(model: nn.Module, ids: Tensor) -> Outcome:
    cache = new_cache(model)
    cache.activate_past_recording()
    in_chunks(model, ids[:, :14], 14, cache)
    cache.crop(-5)
    other = torch.cat([ids[:, :9], ids.flip(1)[:, 9:]], 1)
    return compare(in_chunks(model, other, 4, cache, start=9), full(model, other)[:, 9:])


@way("cropped to nothing", "crop ignored")
def cropped_to_nothing(model: nn.Module, ids: Tensor) -> Outcome:
    cache = new_cache(model)
    in_chunks(model, ids[:, :5], 5, cache)
    cache.crop(-5)
    other = ids.flip(1)
    return compare(in_chunks(model, other, 4, cache), full(model, other))


@way("cache reset", "reset ignored")
def cache_reset(model: nn.Module, ids: Tensor) -> Outcome:
    cache = new_cache(model)
    in_chunks(model, ids, 7, cache)
    cache.reset()
    other = ids.flip(1)
    return compare(in_chunks(model, other, 4, cache), full(model, other))


# ---- padding ---------------------------------------------------------------------------------------------------------


@way("left padding", "padding unseen")
def left_padding(model: nn.Module, ids: Tensor) -> Outcome:
    rows, mask, places = padded(ids, "left")
    return compare_rows(
        model, model(rows, attention_mask=mask, position_ids=places, use_cache=False).logits, ids, mask
    )


@way("left padding, cached", "padding unseen", "ids forgotten", "conv forgotten")
def left_padding_cached(model: nn.Module, ids: Tensor) -> Outcome:
    rows, mask, places = padded(ids, "left")
    cache, parts = new_cache(model), []
    for a, b in [(0, 3), (3, 9), (9, 16), (16, 17), (17, 20)]:
        part = model(
            rows[:, a:b],
            attention_mask=mask[:, :b],
            position_ids=places[:, a:b],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(part.logits)
    return compare_rows(model, torch.cat(parts, 1), ids, mask)


@way("right padding")
def right_padding(model: nn.Module, ids: Tensor) -> Outcome:
    """Nothing of a causal model's past is padding here, so no broken state can show."""
    rows, mask, places = padded(ids, "right")
    return compare_rows(
        model, model(rows, attention_mask=mask, position_ids=places, use_cache=False).logits, ids, mask
    )


@way("right padding, then on", "padding unseen", "ids forgotten", "conv forgotten")
def right_padding_then_on(model: nn.Module, ids: Tensor) -> Outcome:
    """A right-padded prompt goes on: the padding now stands between tokens."""
    rows, mask, places = padded(ids, "right")
    cache = new_cache(model)
    first = model(
        rows, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
    ).logits
    more = ids.flip(1)[:, :7]
    places_on = torch.tensor(LENGTHS)[:, None] + torch.arange(7)
    parts = []
    for a, b in [(0, 1), (1, 2), (2, 6), (6, 7)]:
        mask = torch.cat([mask, torch.ones(3, b - a, dtype=mask.dtype)], 1)
        part = model(
            more[:, a:b],
            attention_mask=mask,
            position_ids=places_on[:, a:b],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(part.logits)
    logits, outcomes = torch.cat(parts, 1), []
    for b, n in enumerate(LENGTHS):
        want = full(model, torch.cat([ids[b : b + 1, :n], more[b : b + 1]], 1))[0]
        outcomes += [compare(first[b, :n], want[:n]), compare(logits[b], want[n:])]
    return worst(outcomes)


@way("static cache, left padding", "padding unseen", "ids forgotten", "conv forgotten")
def static_left_padding(model: nn.Module, ids: Tensor) -> Outcome:
    rows, mask, places = padded(ids, "left")
    cache, parts = static(model), []
    for a, b in [(0, 11), *((t, t + 1) for t in range(11, 20))]:
        part = model(
            rows[:, a:b], attention_mask=mask[:, :b], position_ids=places[:, a:b], past_key_values=cache
        )
        parts.append(part.logits)
    return compare_rows(model, torch.cat(parts, 1), ids, mask)


@way("static cache, mask of its length", "padding unseen", "ids forgotten", "conv forgotten")
def static_long_mask(model: nn.Module, ids: Tensor) -> Outcome:
    """The mask covers the whole cache from the start, as exported models pass it."""
    rows, mask, places = padded(ids, "left")
    cache, parts = static(model), []
    long_mask = torch.cat([mask, torch.zeros(3, 12, dtype=mask.dtype)], 1)
    for a, b in [(0, 11), *((t, t + 1) for t in range(11, 20))]:
        shown = long_mask.clone()
        shown[:, b:] = 0
        part = model(rows[:, a:b], attention_mask=shown, position_ids=places[:, a:b], past_key_values=cache)
        parts.append(part.logits)
    return compare_rows(model, torch.cat(parts, 1), ids, mask)


# ---- documents -------------------------------------------------------------------------------------------------------

DOCUMENTS = ((8, 5, 7), (3, 16, 1), (1, 1, 18))


@way("packed documents", "documents unseen", "conv crosses documents")
def packed_documents(model: nn.Module, ids: Tensor) -> Outcome:
    places = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
    logits = model(ids, position_ids=places, use_cache=False).logits
    outcomes = []
    for b, row in enumerate(DOCUMENTS):
        begin = 0
        for n in row:
            part = slice(begin, begin + n)
            outcomes.append(compare(logits[b, part], full(model, ids[b : b + 1, part])[0]))
            begin += n
    return worst(outcomes)


@way("after an unrelated prompt", "state leaks")
def after_another(model: nn.Module, ids: Tensor) -> Outcome:
    """Other text before, and between: what it leaves behind must not be seen."""
    other, cache = ids.flip(0, 1), new_cache(model)
    model(other, use_cache=True)
    generate(model, other[:, :6], 2)
    between, parts = new_cache(model), []
    for t in range(ids.shape[1]):
        parts.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
        if t % 3 == 0:
            model(other[:, t : t + 1], past_key_values=between)
    return compare(torch.cat(parts, 1), full(model, ids))


# ---- static caches ---------------------------------------------------------------------------------------------------


@way("static cache", "ids forgotten", "conv forgotten")
def static_cache(model: nn.Module, ids: Tensor) -> Outcome:
    cache = static(model)
    first = model(ids[:, :5], past_key_values=cache).logits
    return compare(torch.cat([first, in_chunks(model, ids, 1, cache, start=5)], 1), full(model, ids))


@way("static cache, chunks of 4", "ids forgotten", "conv forgotten")
def static_chunks(model: nn.Module, ids: Tensor) -> Outcome:
    return compare(in_chunks(model, ids, 4, static(model)), full(model, ids))


@way("static cache, rows reordered", "rows stay", "ids forgotten", "conv forgotten")
def static_reordered(model: nn.Module, ids: Tensor) -> Outcome:
    rows = torch.tensor([2, 0, 0])
    return _continue(model, ids, lambda cache: cache.reorder_cache(rows), rows, static(model))


@way("static cache reset", "reset ignored")
def static_reset(model: nn.Module, ids: Tensor) -> Outcome:
    cache = static(model)
    in_chunks(model, ids, 7, cache)
    cache.reset()
    other = ids.flip(1)
    return compare(in_chunks(model, other, 4, cache), full(model, other))


# ---- generate --------------------------------------------------------------------------------------------------------


@way("greedy", "ids forgotten", "conv forgotten")
def greedy(model: nn.Module, ids: Tensor) -> Outcome:
    return compare_generated(model, generate(model, ids[:, :7]), 7)


@way("greedy, prompt in chunks", "ids forgotten", "conv forgotten")
def greedy_chunked_prompt(model: nn.Module, ids: Tensor) -> Outcome:
    return compare_generated(model, generate(model, ids[:, :11], prefill_chunk_size=4), 11)


@way("greedy, cache handed on", "ids forgotten", "conv forgotten")
def greedy_continued(model: nn.Module, ids: Tensor) -> Outcome:
    """The cache of one generate is the start of the next."""
    first = generate(model, ids[:, :7], 5)
    second = generate(model, first.sequences, 5, past_key_values=first.past_key_values)
    return compare_generated(model, second, first.sequences.shape[1])


@way("greedy, static cache", "ids forgotten", "conv forgotten")
def greedy_static(model: nn.Module, ids: Tensor) -> Outcome:
    return compare_generated(model, generate(model, ids[:, :7], cache_implementation="static"), 7)


def _padded_generation(model: nn.Module, ids: Tensor, **options: Any) -> Outcome:
    rows, mask, _ = padded(ids, "left")
    out = generate(model, rows, attention_mask=mask, **options)
    logits, outcomes = torch.stack(out.logits, 1), []
    for b, n in enumerate(LENGTHS):
        alone = torch.cat([ids[b, :n], out.sequences[b, 20:]])[None]
        want = full(model, alone)[0, n - 1 : -1]
        outcome = compare(logits[b].to(want.dtype), want)
        if not torch.equal(generate(model, ids[b : b + 1, :n]).sequences, alone):
            outcome = Outcome(error=max(1.0, outcome.error), scale=outcome.scale)
        outcomes.append(outcome)
    return worst(outcomes)


@way("padded batch, greedy", "padding unseen", "ids forgotten", "conv forgotten")
def greedy_padded(model: nn.Module, ids: Tensor) -> Outcome:
    """Steps and tokens of a left-padded batch are those of each prompt alone."""
    return _padded_generation(model, ids)


@way("padded batch, static cache", "padding unseen", "ids forgotten", "conv forgotten")
def greedy_padded_static(model: nn.Module, ids: Tensor) -> Outcome:
    return _padded_generation(model, ids, cache_implementation="static")


def _beams(model: nn.Module, prompt: Tensor, **options: Any) -> Outcome:
    n_prompt, n_beams = prompt.shape[1], 3
    out = generate(
        model, prompt, num_beams=n_beams, num_return_sequences=n_beams, output_scores=True, **options
    )
    want = full(model, out.sequences)[:, n_prompt - 1 : -1]
    # beam_indices: the row of the running batch that each step of a returned sequence was computed in
    got = torch.stack(out.logits, 1).to(want.dtype)
    steps = torch.arange(want.shape[1])
    outcome = compare(got[out.beam_indices[:, : len(steps)], steps], want)
    new = out.sequences[:, n_prompt:]
    scores = want.log_softmax(-1).gather(2, new[..., None])[..., 0].sum(1) / new.shape[1]
    return worst([outcome, compare(out.sequences_scores.to(scores.dtype), scores)])


@way("beam search", "rows stay", "ids forgotten", "conv forgotten")
def beams(model: nn.Module, ids: Tensor) -> Outcome:
    """Reported scores and the logits of every step on the way equal those recomputed from full forwards."""
    return _beams(model, ids[:, :7])


@way("beam search, static cache", "rows stay", "ids forgotten", "conv forgotten")
def beams_static(model: nn.Module, ids: Tensor) -> Outcome:
    return _beams(model, ids[:, :7], cache_implementation="static")


@way("assisted", "crop ignored", "ids forgotten", "conv forgotten")
def assisted(model: nn.Module, ids: Tensor) -> Outcome:
    """The assistant is this model made a little wrong, memory included, so that some guesses hold and some do not."""
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        head = assistant.get_output_embeddings().weight
        # half of all tokens are hardly ever its guess
        head[::2] = 0
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return compare_generated(model, generate(model, ids[:1, :9], 12, assistant_model=assistant), 9)


@way("prompt lookup", "crop ignored", "ids forgotten", "conv forgotten")
def prompt_lookup(model: nn.Module, ids: Tensor) -> Outcome:
    prompt = torch.cat([ids[:1, :6], ids[:1, :6], ids[:1, :3]], 1)
    return compare_generated(model, generate(model, prompt, 12, prompt_lookup_num_tokens=3), 15)


# ---- compiled --------------------------------------------------------------------------------------------------------


def _compiled(model: nn.Module, backend: str = "aot_eager") -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


@way("compiled", compiled=True)
def compiled(model: nn.Module, ids: Tensor) -> Outcome:
    return compare(_compiled(model)(ids, use_cache=False).logits, full(model, ids))


@way("compiled, left padding", "padding unseen", "compiled gather shifted", compiled=True)
def compiled_left_padding(model: nn.Module, ids: Tensor) -> Outcome:
    rows, mask, places = padded(ids, "left")
    logits = _compiled(model)(rows, attention_mask=mask, position_ids=places, use_cache=False).logits
    return compare_rows(model, logits, ids, mask)


@way("compiled, static cache", "ids forgotten", "conv forgotten", compiled=True)
def compiled_static(model: nn.Module, ids: Tensor) -> Outcome:
    """Eager prompt, compiled steps, as generate does it on an accelerator."""
    cache, step = static(model), _compiled(model)
    parts = [model(ids[:, :9], past_key_values=cache).logits]
    places = torch.arange(ids.shape[1])[None]
    for t in range(9, ids.shape[1]):
        parts.append(step(ids[:, t : t + 1], position_ids=places[:, t : t + 1], past_key_values=cache).logits)
    return compare(torch.cat(parts, 1), full(model, ids))


@way("compiled by inductor, static cache", "ids forgotten", "conv forgotten", compiled=True)
def inductor_static(model: nn.Module, ids: Tensor) -> Outcome:
    cache, step = static(model), _compiled(model, "inductor")
    parts = [model(ids[:, :15], past_key_values=cache).logits]
    places = torch.arange(ids.shape[1])[None]
    for t in range(15, ids.shape[1]):
        parts.append(step(ids[:, t : t + 1], position_ids=places[:, t : t + 1], past_key_values=cache).logits)
    return compare(torch.cat(parts, 1), full(model, ids))


# ---- gradient checkpointing ------------------------------------------------------------------------------------------


def _gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Gradients of two forwards of different text and one backward; rows as dense tensors."""
    model.train()
    model.zero_grad()
    slots = [slot for found in memories(model).values() for slot in found.slots]
    try:
        first = model(ids, labels=ids, use_cache=False).loss
        second = model(ids.flip(1), labels=ids.flip(1), use_cache=False).loss
        (first + 2 * second).backward()
        found = [p.grad.clone() for name, p in model.named_parameters() if p.grad is not None]
        for slot in slots:
            rows = torch.zeros(slot.table.n_rows, slot.table.width)
            unique, merged = slot.table.gradients._pending
            rows[unique] = merged
            found.append(rows)
    finally:
        model.zero_grad()
        forget_pending(model)
        model.eval()
    return found


def _checkpointed(model: nn.Module, ids: Tensor, *, reentrant: bool) -> Outcome:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    want = _gradients(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    try:
        got = _gradients(model, ids)
    finally:
        model.activation_checkpointing_disable()
        if reentrant:
            model.disable_input_require_grads()
    assert len(got) == len(want)
    return Outcome(
        error=max(
            float((g - w).abs().max() / w.abs().max().clamp_min(1e-6)) for g, w in zip(got, want, strict=True)
        )
    )


@way("gradient checkpointing", "recomputed with other rows", gradients=True)
def checkpointing(model: nn.Module, ids: Tensor) -> Outcome:
    """Every gradient, rows included, of two forwards before one backward, relative to that without checkpointing."""
    return _checkpointed(model, ids, reentrant=False)


@way("gradient checkpointing, reentrant", "recomputed with other rows", gradients=True)
def checkpointing_reentrant(model: nn.Module, ids: Tensor) -> Outcome:
    return _checkpointed(model, ids, reentrant=True)


# One of each kind, for models whose forward takes a second; the first five also in float32.
ON_REAL_MODELS = (
    "chunks of 7",
    "left padding, cached",
    "packed documents",
    "static cache",
    "beam search",
    "one token a step",
    "rows reordered",
    "cropped, then otherwise",
    "right padding, then on",
    "padded batch, greedy",
    "assisted",
)


# ---- broken state ----------------------------------------------------------------------------------------------------


def _forget_ids(begin_ids: Callable) -> Callable:
    return lambda self, ids: torch.full_like(begin_ids(self, ids), ABSENT)


def _forget_conv(with_past: Callable) -> Callable:
    def without(self: Window, key: Any, new: Tensor, length: int) -> Tensor:
        if self.state is not None and key in self.state.conv_inputs:
            self.state.conv_inputs[key].zero_()
        return with_past(self, key, new, length)

    return without


def _crop_front(self: MemoryState, tokens_to_remove: int) -> None:
    """Right length, wrong tokens."""
    self._map(lambda x: x[:, -tokens_to_remove:] if tokens_to_remove else x)
    self.seen += tokens_to_remove


def _crop_nothing(self: MemoryState, tokens_to_remove: int) -> None:
    self.seen += tokens_to_remove


def _leak(state_of: Callable) -> Callable:
    def with_junk(cache: Any, **kwargs: Any) -> MemoryState:
        state = state_of(cache, **kwargs)
        if state.ids is None:
            state.ids = torch.full((3, 5), 77)
        return state

    return with_junk


def _crossing(short_conv: Callable) -> Callable:
    def crossing(*args: Any, segments_BS: Any = None, **kwargs: Any) -> Tensor:
        return short_conv(*args, **kwargs)

    return crossing


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A plain function, because torch.compile does not trace a Mock."""


def _other_rows(read: Callable) -> Callable:
    def shifted(self: Any, address: Tensor, handle: Tensor, ticket: Any = None) -> Tensor:
        # in the compiled graph alone: the eager reference must stay right
        return read(
            self, torch.roll(address, 1, dims=1) if torch.compiler.is_compiling() else address, handle
        )

    return shifted


def _checkpointed_only(read: Callable) -> Callable:
    """Reads other rows on every second forward, as a hook that runs again in a recomputation could."""
    calls = []

    def other(self: Any, address: Tensor, handle: Tensor, ticket: Any = None) -> Tensor:
        calls.append(None)
        return read(self, torch.roll(address, len(calls) % 7, dims=1), handle)

    return other


@contextlib.contextmanager
def broken(how: str) -> Iterator[None]:
    """The state broken in one way while the block runs."""
    keep_rows = {
        "reorder_cache": lambda self, rows: None,
        "batch_repeat_interleave": lambda self, n: self._map(lambda x: x.repeat(n, *[1] * (x.dim() - 1))),
        "batch_select_indices": lambda self, rows: self._map(lambda x: x[: len(rows)]),
    }
    patches = {
        "ids forgotten": [mock.patch.object(MemoryState, "begin_ids", _forget_ids(MemoryState.begin_ids))],
        "conv forgotten": [mock.patch.object(Window, "with_past", _forget_conv(Window.with_past))],
        "rows stay": [mock.patch.object(MemoryState, name, change) for name, change in keep_rows.items()],
        "crop ignored": [mock.patch.object(MemoryState, "crop", _crop_nothing)],
        "crop takes the front": [mock.patch.object(MemoryState, "crop", _crop_front)],
        "reset ignored": [mock.patch.object(MemoryState, "reset", lambda self: setattr(self, "seen", 0))],
        "padding unseen": [
            mock.patch.object(runtime, "real_places", _nothing),
            # which would take the positions of unseen padding for documents, and raise
            mock.patch.object(runtime, "document_starts", _nothing),
        ],
        "documents unseen": [mock.patch.object(runtime, "document_starts", _nothing)],
        "conv crosses documents": [mock.patch.object(layer, "short_conv", _crossing(layer.short_conv))],
        "state leaks": [mock.patch.object(runtime, "state_of", _leak(runtime.state_of))],
        "compiled gather shifted": [mock.patch.object(DeviceTable, "read", _other_rows(DeviceTable.read))],
        "recomputed with other rows": [
            mock.patch.object(DeviceTable, "read", _checkpointed_only(DeviceTable.read))
        ],
    }
    with contextlib.ExitStack() as stack:
        for patch in patches[how]:
            stack.enter_context(patch)
        yield
