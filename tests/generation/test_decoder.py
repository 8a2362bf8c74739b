"""Rows that come and go say what each says alone; engines are taken by what they give."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engram_lm.errors import ConfigError  # noqa: E402
from engram_lm.generation import Decoder, Gives, HeatView, Request, TransformersEngine, stream  # noqa: E402
from engram_lm.generation.engines import Forward  # noqa: E402
from engram_lm.index.segment import Segment  # noqa: E402
from engram_lm.index.snapshot import LiveSegment, Snapshot  # noqa: E402
from engram_lm.mixing import FixedLambda, memory_processor  # noqa: E402
from engram_lm.mixing.mix import TokenRules  # noqa: E402
from matrix import KeepFloat64  # noqa: E402
from models import build, give_memory  # noqa: E402

V = 258
PROMPTS = (
    [70, 71, 72, 73, 74, 75, 76, 77, 78],
    [90, 91],
    [70, 71, 99, 70, 71, 99, 70],
    [120],
    [33, 34, 35, 36],
)
# step at which each comes, and how many tokens it asks for: some leave while others are in the middle, some come late
COMES, ASKS = (0, 0, 2, 3, 6), (9, 3, 7, 8, 5)


def watched(engine):
    """The engine; `engine.sizes` has how many rows each forward read."""
    sizes, read = [], engine.read

    def reading(ids_NT, **options):
        sizes.append(len(ids_NT))
        return read(ids_NT, **options)

    engine.read, engine.sizes = reading, sizes
    return engine


def together(decoder, requests, processors=None):
    """Every row's tokens, where rows come at the steps of COMES."""
    processors = processors or [None] * len(requests)
    rows, said, step = {}, {n: [] for n in range(len(requests))}, 0
    while len(rows) < len(requests) or any(not row.finished for row in rows.values()):
        for n, request in enumerate(requests):
            if COMES[n] == step:
                rows[n] = decoder.add(request, processors[n])
        # any order will do
        going = sorted((n for n in rows if not rows[n].finished), key=lambda n: (n + step) % 3)
        for n, tokens in zip(going, decoder.step([rows[n] for n in going]), strict=True):
            said[n] += tokens
        step += 1
    return said


def requests(**options):
    return [Request(ids=ids, max_new_tokens=n, **options) for ids, n in zip(PROMPTS, ASKS, strict=True)]


# keys and values, a window of them, and states of linear attention beside them
SHARING = [("llama", "paper"), ("mistral", "several"), ("qwen3_next", "paper")]
SLOW = ["gpt2", "gemma3", "qwen3_moe", "bloom", "deepseek_v3"]


@pytest.mark.parametrize(
    ("name", "memory"),
    [*SHARING, *(pytest.param(name, "paper", marks=pytest.mark.slow) for name in SLOW)],
)
def test_rows_in_a_batch_say_what_they_say_alone(name, memory):
    model = give_memory(build(name, torch.float64), memory)
    engine = watched(TransformersEngine(model))
    view = HeatView(quantity="gate")
    with KeepFloat64():
        alone = [list(stream(engine, request)) for request in requests(view=view)]
        engine.sizes.clear()
        said = together(Decoder(engine), requests(view=view))
    assert max(engine.sizes) >= 3
    for n, tokens in enumerate(alone):
        assert [token.id for token in said[n]] == [token.id for token in tokens]
        assert [token.strength for token in said[n]] == pytest.approx(
            [token.strength for token in tokens], abs=1e-6
        )
        assert [token.share for token in said[n]] == pytest.approx(
            [token.share for token in tokens], rel=1e-5
        )
        assert [token.is_prompt for token in said[n]] == [token.is_prompt for token in tokens]


def test_logits_of_a_batch_are_those_of_each_row_alone():
    """The same tokens could come of logits that are a little wrong."""
    model = give_memory(build("llama", torch.float64), "paper")
    seen = {}

    class Seeing:
        def __init__(self, key):
            self.key = key

        def __call__(self, input_ids, scores):
            seen.setdefault(self.key, []).append(scores[0])
            return scores

        def step_of(self, token):
            return None

    engine = TransformersEngine(model)
    with KeepFloat64():
        for n, request in enumerate(requests()):
            list(stream(engine, request, Seeing(("alone", n))))
        together(Decoder(engine), requests(), [Seeing(("together", n)) for n in range(len(PROMPTS))])
    for n in range(len(PROMPTS)):
        one, other = (torch.stack(seen[kind, n]) for kind in ("alone", "together"))
        assert (one - other).abs().max() < 1e-12 * one.abs().max() * 100


def test_state_that_is_left_behind_would_be_seen(monkeypatch):
    """The comparison above can fail: without memory's state of the past, rows in a batch say something else."""
    from engram_lm.nn import MemoryState

    model = give_memory(build("llama", torch.float64), "paper")
    engine = TransformersEngine(model)
    join = MemoryState.join.__func__

    def forgetful(cls, states, pads):
        made = join(cls, states, pads)
        made.conv_inputs = {key: torch.zeros_like(value) for key, value in made.conv_inputs.items()}
        return made

    with KeepFloat64():
        alone = [[token.share for token in stream(engine, request)] for request in requests()]
        monkeypatch.setattr(MemoryState, "join", classmethod(forgetful))
        said = together(Decoder(engine), requests())
    assert any(
        np.abs(np.array(shares) - np.array([token.share for token in said[n]])).max() > 1e-3
        for n, shares in enumerate(alone)
        if len(said[n]) == len(shares)
    )


def test_each_row_has_its_own_index_temperature_and_switch():
    model = give_memory(build("llama", torch.float64), "paper")
    segment = Segment.build([[70, 71, 99, 70, 71, 99, 110, 111, 112] * 3, [90, 91, 92, 93, 94]], vocab_size=V)
    snapshot = Snapshot([LiveSegment(segment)], vocab_size=V)
    rules = TokenRules(n_logits=V, n_tokens=V, eos_id=None, silent=())

    def processors():
        return [
            memory_processor(snapshot, FixedLambda(0.9), torch.tensor([ids]), rules=rules) if n % 2 else None
            for n, ids in enumerate(PROMPTS)
        ]

    asked = [
        Request(
            ids=ids,
            max_new_tokens=ASKS[n],
            temperature=0.8 * (n == 2),
            seed=n,
            memory="off" if n == 4 else "on",
        )
        for n, ids in enumerate(PROMPTS)
    ]
    engine = watched(TransformersEngine(model))
    with KeepFloat64():
        alone = [
            list(stream(engine, request, processor))
            for request, processor in zip(asked, processors(), strict=True)
        ]
        said = together(Decoder(engine), asked, processors())
    for n, tokens in enumerate(alone):
        assert [token.id for token in said[n]] == [token.id for token in tokens]
        assert [token.strength for token in said[n]] == pytest.approx(
            [token.strength for token in tokens], abs=1e-5
        )
    assert [token.id for token in said[1]][2:] == [92, 93, 94]
    assert {token.share for token in said[4]} == {0.0}


def test_alone_it_says_what_transformers_generates_to_the_bit():
    model = give_memory(build("llama"), "paper")
    for ids in PROMPTS:
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)
        said = [token.id for token in stream(TransformersEngine(model), Request(ids=ids, max_new_tokens=9))]
        assert said == wanted[0].tolist()


def test_an_unwatched_row_costs_a_forward_less_and_says_the_same():
    model = give_memory(build("llama"), "paper")
    engine = watched(TransformersEngine(model))
    said = {}
    for watch in (True, False):
        engine.sizes.clear()
        request = Request(ids=PROMPTS[0], max_new_tokens=5, watch=watch)
        said[watch] = [token.id for token in stream(engine, request)], len(engine.sizes)
    assert said == {True: (said[True][0], 6), False: (said[True][0], 5)}


def test_rows_of_caches_that_cannot_be_joined_are_read_one_by_one(monkeypatch):
    model = give_memory(build("llama", torch.float64), "paper")
    engine = watched(TransformersEngine(model))
    engine.can_join = lambda cache: False
    with KeepFloat64():
        said = together(Decoder(engine), requests())
        assert set(engine.sizes) == {1}
        for n, request in enumerate(requests()):
            assert [token.id for token in said[n]] == [token.id for token in stream(engine, request)]


def test_an_end_token_ends_a_row_and_is_not_said():
    model = build("llama")
    engine = TransformersEngine(model)
    said = [token.id for token in stream(engine, Request(ids=PROMPTS[0], max_new_tokens=6))]
    end = said[len(PROMPTS[0]) + 2]
    decoder = Decoder(engine)
    row = decoder.add(Request(ids=PROMPTS[0], max_new_tokens=6, ends=frozenset([end])))
    tokens = []
    while not row.finished:
        tokens += decoder.step([row])[0]
    n = said.index(end, len(PROMPTS[0]))
    assert [token.id for token in tokens] == said[:n]
    assert row.end == (end, None)
    assert row.new_tokens == said[len(PROMPTS[0]) : n]


def test_what_is_too_long_is_refused():
    decoder = Decoder(TransformersEngine(build("llama")))
    with pytest.raises(ConfigError, match="9 tokens of prompt and 120 new ones exceed the model's 128"):
        decoder.add(Request(ids=PROMPTS[0], max_new_tokens=120))


# ---- other engines ------------------------------------------------------------------------------------------------------


class Bigrams:
    """An engine without transformers: what followed the last token in a text. Its cache is the last token."""

    gives, name, longest, ends = Gives.LOGITS, "bigrams", None, frozenset([0])

    def __init__(self, text):
        self.logits_VV = torch.zeros(V, V)
        for one, other in itertools.pairwise(text):
            self.logits_VV[one, other] += 1

    def read(self, ids_NT, *, cache=None, mask_NL=None, last=1, memory="on", watch=False):
        return Forward(self.logits_VV[ids_NT[:, -last:]], ids_NT[:, -1:].clone())

    def can_join(self, cache):
        return True

    def join(self, caches, pads):
        return torch.cat(caches)

    def take(self, cache, rows, *, cut=0):
        return cache[list(rows)]


def test_another_engine_is_a_class_of_a_few_lines():
    engine = watched(Bigrams([5, 6, 7, 8, 0, 9, 10, 9, 10, 9]))
    decoder = Decoder(engine)
    asked = [Request(ids=ids, max_new_tokens=5) for ids in ([5], [4, 9], [6])]
    rows = [decoder.add(request) for request in asked]
    while any(not row.finished for row in rows):
        decoder.step(rows)
    assert [row.new_tokens for row in rows] == [[6, 7, 8], [10, 9, 10, 9, 10], [7, 8]]
    assert max(engine.sizes) == 3


def test_an_engine_that_gives_too_little_is_refused():
    engine = Bigrams([1, 2])
    for gives, said in (
        (Gives.TEXT, "gives text at most"),
        (Gives.SOME_LOG_PROBABILITIES, "likeliest tokens at most"),
    ):
        engine.gives = gives
        with pytest.raises(ConfigError, match=f"bigrams .*{said}; the logits of every token are needed"):
            Decoder(engine)


def test_a_model_without_a_cache_is_refused():
    engine = Bigrams([1, 2, 3])
    engine.read = lambda ids_NT, **options: Forward(engine.logits_VV[ids_NT[:, -1:]], None)
    with pytest.raises(ConfigError, match="bigrams makes no cache to go on from"):
        list(stream(engine, Request(ids=[1], max_new_tokens=2)))
