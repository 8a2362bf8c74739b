"""Drafts are lossless: the tokens, records and distribution of generation without them, whatever was drafted."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from engram_lm.errors import ConfigError
from engram_lm.generation import Drafts, speculate
from engram_lm.index.segment import Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot
from engram_lm.mixing import FixedLambda, memory_processor
from engram_lm.mixing.lookups import read_next
from engram_lm.mixing.mix import TokenRules, mix_plain
from models import EOS, PAD, build, give_memory

V = 258
RULES = TokenRules(n_tokens=V, n_logits=V, silent=(PAD, EOS), eos_id=EOS)


def a_snapshot(documents, vocab_size=V):
    return Snapshot([LiveSegment(Segment.build(documents, vocab_size=vocab_size))], vocab_size=vocab_size)


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(2, V, 60).tolist() for _ in range(6)]


@pytest.fixture(scope="module")
def snapshot(documents):
    return a_snapshot(documents)


@pytest.fixture(scope="module")
def model():
    built = build("llama", torch.float64)
    built.generation_config.eos_token_id = EOS
    return built


def plainly(model, snapshot, gate, prompt, n, *, session="off", **sampling):
    ids = torch.tensor(prompt)[None]
    processor = memory_processor(snapshot, gate, ids, rules=RULES, session=session)
    sampling = sampling or {"do_sample": False}
    out = model.generate(ids, logits_processor=[processor], max_new_tokens=n, **sampling)
    return out[0, len(prompt) :].tolist(), processor.steps(out)[0]


@pytest.mark.parametrize(
    "gate", [FixedLambda(0.9), FixedLambda(0.3), FixedLambda(0.8, space="log")], ids=["loud", "quiet", "log"]
)
def test_greedy_tokens_are_those_of_plain_generation(model, snapshot, documents, gate):
    rng, accepted = np.random.default_rng(1), 0
    for i in range(8):
        at = int(rng.integers(0, 30))
        prompt = (
            documents[i % 6][at : at + int(rng.integers(1, 9))] if i < 6 else rng.integers(2, V, 5).tolist()
        )
        wanted, records = plainly(model, snapshot, gate, prompt, 24)
        got = speculate(
            model, prompt, snapshot, gate, rules=RULES, max_new_tokens=24, drafts=(1, 3, 8)[i % 3], worth=0.05
        )
        assert got.tokens == wanted
        for step, record in zip(got.steps, records, strict=True):
            assert (step.token_id, step.position, step.depth) == (
                record.token_id,
                record.position,
                record.depth,
            )
            assert step.p == pytest.approx(record.p, rel=1e-4)
        assert len(wanted) == len(got.steps) <= got.forwards + got.accepted <= len(wanted) + 8
        accepted += got.accepted
    assert accepted > (100 if gate.value == 0.9 else 0)


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("llama", "several"),
        ("mistral", "none"),
        *(
            pytest.param(name, tables, marks=pytest.mark.slow)
            for name in ("gpt2", "mistral", "gemma3", "lfm2", "qwen3_moe")
            for tables in ("none", "several")
            if (name, tables) != ("mistral", "none")
        ),
    ],
)
def test_caches_of_other_kinds_are_put_back(name, tables, snapshot, documents):
    model = build(name, torch.float64)
    if tables != "none":
        give_memory(model, tables)
    prompt, options = documents[0][:12], {"rules": RULES, "max_new_tokens": 26}
    wanted, _ = plainly(model, snapshot, FixedLambda(0.9), prompt, 26)
    assert speculate(model, prompt, snapshot, FixedLambda(0.9), **options).tokens == wanted
    # sampled texts leave the document again and again
    rejected = 0
    for seed in range(2):
        options |= {"temperature": 0.9, "seed": seed, "worth": 0.01}
        wanted = speculate(model, prompt, snapshot, FixedLambda(0.6), drafts=0, **options)
        got = speculate(model, prompt, snapshot, FixedLambda(0.6), **options)
        assert got.tokens == wanted.tokens
        assert got.accepted > 0
        rejected += got.drafted - got.accepted
    assert rejected > 5


def test_a_cache_that_cannot_be_put_back_is_refused(snapshot, documents):
    model = build("qwen3_next", torch.float64)
    options = {"rules": RULES, "max_new_tokens": 5}
    with pytest.raises(
        ConfigError, match=r"Qwen3NextForCausalLM holds states that cannot be taken back.*Use drafts=0"
    ):
        speculate(model, documents[0][:5], snapshot, FixedLambda(0.9), **options)
    got = speculate(model, documents[0][:5], snapshot, FixedLambda(0.9), drafts=0, **options)
    assert got.tokens == plainly(model, snapshot, FixedLambda(0.9), documents[0][:5], 5)[0]
    assert (got.forwards, got.drafted) == (5, 0)


def test_it_ends_where_plain_generation_does(model, snapshot, documents):
    gate = FixedLambda(0.95)
    for left, n in ((3, 20), (9, 20), (20, 7), (20, 1), (20, 2)):
        prompt = documents[2][60 - left - 6 : 60 - left]
        wanted, _ = plainly(model, snapshot, gate, prompt, n)
        got = speculate(model, prompt, snapshot, gate, rules=RULES, max_new_tokens=n)
        assert got.tokens == wanted
        assert (got.tokens[-1] == EOS) == (n > left)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_seed_is_one_text_with_drafts_or_without(model, snapshot, documents, temperature):
    accepted = 0
    for seed in range(4):
        texts = [
            speculate(
                model, documents[seed % 6][:6], snapshot, FixedLambda(0.9), rules=RULES, max_new_tokens=30,
                drafts=drafts, temperature=temperature, seed=seed, worth=0.05,
            )
            for drafts in (0, 1, 8)
        ]  # fmt: skip
        assert texts[0].tokens == texts[1].tokens == texts[2].tokens
        accepted += texts[2].accepted
    assert accepted > 5


class Recurrence(nn.Module):
    """Logits from everything read so far, so that a cache cropped wrongly is seen. `reads`: tokens of every forward."""

    def __init__(self, V, seed=0):
        super().__init__()
        self.table = nn.Parameter(torch.randn(97, V, generator=torch.Generator().manual_seed(seed)))
        self.config, self.generation_config = SimpleNamespace(), SimpleNamespace(eos_token_id=None)
        self.reads = []

    def logits(self, said):
        return self.table[sum((i + 3) * (token + 1) ** 2 for i, token in enumerate(said)) % 97]

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        cache = past_key_values or Kept()
        new, before = input_ids[0].tolist(), len(cache.said)
        cache.said = cache.said + new
        self.reads.append(len(new))
        logits = torch.stack([self.logits(cache.said[: before + i + 1]) for i in range(len(new))])[None]
        return SimpleNamespace(logits=logits.detach(), past_key_values=cache)


class Kept:
    is_croppable = True

    def __init__(self):
        self.said = []

    def activate_past_recording(self):
        pass

    def get_seq_length(self):
        return len(self.said)

    def crop(self, tokens_to_remove):
        assert tokens_to_remove <= 0
        self.said = self.said[: len(self.said) + tokens_to_remove]


def test_sampled_texts_have_the_mixed_distribution():
    model, rules = Recurrence(4), TokenRules(n_tokens=4, n_logits=4)
    snapshot = a_snapshot([[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 3, 1]], 4)
    gate, temperature, n, samples = FixedLambda(0.6), 0.8, 3, 600

    def p_next(context):
        q, _ = read_next(snapshot, np.array(context), rules, gate.reading, out=np.empty(5, np.float32))
        log_p = mix_plain(model.logits(context).detach().numpy(), q, lam=0.6) / temperature
        return np.exp(log_p - np.logaddexp.reduce(log_p))

    wanted = {}
    for text in itertools.product(range(4), repeat=n):
        wanted[text] = np.prod([p_next([0, 1, *text[:i]])[text[i]] for i in range(n)])
    found, drafted, accepted = dict.fromkeys(wanted, 0), 0, 0
    for seed in range(samples):
        got = speculate(
            model,
            [0, 1],
            snapshot,
            gate,
            rules=rules,
            max_new_tokens=n,
            temperature=temperature,
            seed=seed,
            worth=0.01,
        )
        found[tuple(got.tokens)] += 1
        drafted, accepted = drafted + got.drafted, accepted + got.accepted
    assert min(accepted, drafted - accepted) > samples // 10
    expected = np.array(list(wanted.values())) * samples
    counts, few = np.array(list(found.values())), expected < 5
    expected, counts = (np.append(x[~few], x[few].sum()) for x in (expected, counts))
    chi_square, free = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    assert free > 15
    # Fisher's approximation: normal with variance 1; 3.3 is one seed in two thousand, and the seeds are fixed
    assert abs(np.sqrt(2 * chi_square) - np.sqrt(2 * free - 1)) < 3.3


def test_drafts_adapt_to_what_memory_knows():
    rules = TokenRules(n_tokens=50, n_logits=50)
    rng = np.random.default_rng(0)
    known = rng.integers(0, 50, 400).tolist()
    verbatim = speculate(
        Recurrence(50),
        known[:10],
        a_snapshot([known], 50),
        FixedLambda(0.99),
        rules=rules,
        max_new_tokens=200,
    )
    assert verbatim.tokens == known[10:210]
    assert verbatim.forwards <= 200 / 6
    # memory knows long matches, and what followed them never comes: lambda is next to nothing
    model = Recurrence(50)
    said = speculate(
        model, [1, 2], a_snapshot([], 50), FixedLambda(0.1), rules=rules, max_new_tokens=300
    ).tokens
    misleading = [[*said[i : i + 6], (said[i + 6] + 1) % 50] for i in range(290)]
    model.reads.clear()
    wrong = speculate(
        model, [1, 2], a_snapshot(misleading, 50), FixedLambda(1e-6), rules=rules, max_new_tokens=300
    )
    assert wrong.tokens == said
    assert wrong.drafted - wrong.accepted < 25
    assert sum(model.reads[150:]) - len(model.reads[150:]) <= 5


def test_inside_generate_its_own_options_hold(model, snapshot, documents):
    for seed, sampling in enumerate(
        (
            {"do_sample": False},
            {"do_sample": True, "temperature": 0.6, "top_k": 40, "repetition_penalty": 1.2},
            {"do_sample": True, "top_p": 0.8, "min_new_tokens": 18},
        )
    ):
        prompt = documents[seed][2:10]
        ids, runs = torch.tensor(prompt)[None], []
        for with_drafts in (False, True):
            processor = memory_processor(snapshot, FixedLambda(0.8), ids, rules=RULES)
            drafts = Drafts(processor, worth=0.05)
            torch.manual_seed(seed)
            more = {"custom_generate": drafts} if with_drafts else {}
            out = model.generate(ids, logits_processor=[processor], max_new_tokens=25, **sampling, **more)
            runs.append((out, [step.p for step in processor.steps(out)[0]]))
        assert torch.equal(runs[0][0], runs[1][0])
        assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4)
        assert drafts.accepted > 3
        assert drafts.forwards < 22


def test_a_session_memory_is_drafted_from(model):
    nothing = Snapshot([], vocab_size=V)
    phrase = np.random.default_rng(5).integers(2, V, 20).tolist()
    prompt = [*phrase, 9, *phrase[:5]]
    wanted, _ = plainly(model, nothing, FixedLambda(0.9), prompt, 60, session=64)
    got = speculate(model, prompt, nothing, FixedLambda(0.9), rules=RULES, max_new_tokens=60, session=64)
    assert got.tokens == wanted
    assert got.tokens[:15] == phrase[5:]
    assert got.accepted > 10


def test_refusals(model, snapshot):
    gate, options = FixedLambda(0.5), {"rules": RULES, "max_new_tokens": 5}
    for wrong, message in (
        ({"drafts": -1}, "drafts is a whole number"),
        ({"worth": 0.0}, "worth is more than 0"),
        ({"temperature": -1.0}, "temperature at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is at least 1"),
        ({"max_new_tokens": 500}, "exceed the model's 128"),
    ):
        with pytest.raises(ConfigError, match=message):
            speculate(model, [3, 4], snapshot, gate, **{**options, **wrong})
    with pytest.raises(ConfigError, match=r"one prompt.*\(2, 3\)"):
        speculate(model, torch.full((2, 3), 5), snapshot, gate, **options)
    ids = torch.full((1, 4), 5)
    drafts = Drafts(memory_processor(snapshot, gate, ids, rules=RULES))
    with pytest.raises(ConfigError, match="one row without padding"):
        model.generate(ids, custom_generate=drafts, num_beams=2, do_sample=False, max_new_tokens=3)
    with pytest.raises(ConfigError, match="tokens alone"):
        model.generate(ids, custom_generate=drafts, return_dict_in_generate=True, max_new_tokens=3)


@pytest.mark.slow
def test_smollm2_says_the_same_with_drafts():
    from engram_lm.bases.base import load_base
    from engram_lm.mixing import default_gate

    base = load_base("smollm2", report=lambda line: None)
    texts = [
        "The memory of a language model can be kept in a table beside it: every sequence of tokens has an address, and the "
        "rows found there are added to the hidden state. Reading them takes no arithmetic to speak of.",
        "Seventeen keepers look after the lighthouse of Orsvik, which was built in 1834 from the stones of an older one. In "
        "winter the path is closed, and supplies come by boat from the mainland on the first Monday of the month.",
    ]
    V = base.tokenizer.backend_tokenizer.get_vocab_size()
    snapshot = a_snapshot([base.tokenizer(text).input_ids for text in texts], V)
    prompts = [
        "The memory of a language model can be",
        "Seventeen keepers look after the lighthouse",
        "Paris is",
    ]
    for text, gate in itertools.product(prompts, (default_gate(), FixedLambda(0.8))):
        ids = base.tokenizer(text, return_tensors="pt").input_ids
        known = {"tokenizer": base.tokenizer, "model": base.model}
        processor = memory_processor(snapshot, gate, ids, **known)
        wanted = base.model.generate(ids, logits_processor=[processor], max_new_tokens=40, do_sample=False)
        got = speculate(base.model, ids, snapshot, gate, tokenizer=base.tokenizer, max_new_tokens=40)
        assert got.tokens == wanted[0, ids.shape[1] :].tolist()
        assert got.accepted > 15 or not isinstance(gate, FixedLambda) or text.startswith("Paris")
