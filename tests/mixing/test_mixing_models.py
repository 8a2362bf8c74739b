"""Memory in transformers' generate and in scoring, against the plain mixture computed step by step."""

import numpy as np
import pytest
import torch

from engram_lm.errors import ConfigError, IdentityError, StateError, TokenIdError
from engram_lm.index.segment import Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot
from engram_lm.mixing import FixedLambda, memory_processor, rules_of, score, summary
from engram_lm.mixing.features import NAMES
from engram_lm.mixing.gate import Gate, LookupConfig
from engram_lm.mixing.lookups import read_next
from engram_lm.mixing.mix import TokenRules, mix_plain
from models import EOS, PAD, build, tokenizer

V = 258
RULES = TokenRules(n_tokens=V, n_logits=V, silent=(PAD, EOS), eos_id=EOS)


@pytest.fixture(scope="module")
def model():
    built = build("llama", torch.float32).eval()
    built.generation_config.pad_token_id, built.generation_config.eos_token_id = PAD, EOS
    return built


@pytest.fixture(scope="module")
def snapshot():
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, V, 40) for _ in range(5)]
    documents.append(np.concatenate([documents[0][:20], documents[1][:15]]))
    return Snapshot([LiveSegment(Segment.build(documents, vocab_size=V))], vocab_size=V)


def a_gate(**changes):
    """Lambda grows with the length of the match and falls where that is the model's own output."""
    F = len(NAMES)
    w = np.zeros(F)
    w[NAMES.index("depth")], w[NAMES.index("model entropy")], w[NAMES.index("fresh")] = 1.0, 0.1, -0.3
    facts = {
        "kind": "logistic", "mean": np.zeros(F), "scale": np.ones(F), "low": np.full(F, -50.0), "high": np.full(F, 50.0),
        "weights": {"w": w, "b": np.array(-1.5)},
    }  # fmt: skip
    return Gate(**{**facts, **changes})


def text_of(snapshot, document, n, *, start=0):
    return snapshot.views[0].segment.document_tokens(document)[start : start + n].astype(np.int64)


def next_p(model, snapshot, gate, context, *, generated=0):
    """log P of the mixture after one context, by the definition; and lambda."""
    with torch.no_grad():
        logits = model(torch.tensor(np.asarray(context))[None]).logits[0, -1].numpy()
    return mixed_log_p(logits, snapshot, gate, context, generated)


def mixed_log_p(logits, snapshot, gate, context, generated):
    from engram_lm.mixing.features import Evidence, features

    q, memory = read_next(
        snapshot, np.array(context), RULES, gate.reading, out=np.empty(snapshot.vocab_size + 1, np.float32)
    )
    x = logits.astype(np.float64)
    log_p = x - np.logaddexp.reduce(x)
    top = int(memory.top[0])
    seen = Evidence.of(
        depth=memory.depth, generated=[generated], count=memory.count, distinct=memory.distinct,
        count_below=memory.count_below, distinct_below=memory.distinct_below,
        documents=memory.documents, memory_entropy=memory.entropy, top_p=memory.top_p,
        model_entropy=[-(np.exp(log_p) * log_p).sum()], model_top_logp=[log_p.max()],
        model_logp_of_top=[log_p[top] if top >= 0 else -np.inf], same_top=[log_p.argmax() == top],
    )  # fmt: skip
    lam = float(gate.lambdas(features(seen, tokens=snapshot.n_tokens))[0]) if memory.count[0] else 0.0
    return mix_plain(logits, q, lam=lam, space=gate.space), lam


def prompts(snapshot):
    """Two prompts of unequal length, padded on the left."""
    a, b = text_of(snapshot, 0, 9), text_of(snapshot, 1, 6)
    ids = np.full((2, 9), PAD)
    ids[0], ids[1, 3:] = a, b
    mask = (np.arange(9) >= np.array([[0], [3]])).astype(np.int64)
    return torch.tensor(ids), torch.tensor(mask), [a, b]


@pytest.mark.parametrize(
    "gate", [a_gate(), FixedLambda(0.4), FixedLambda(0.3, space="log")], ids=["gate", "fixed", "log"]
)
def test_greedy_tokens_and_records_are_those_of_the_definition(model, snapshot, gate):
    ids, mask, texts = prompts(snapshot)
    processor = memory_processor(snapshot, gate, ids, mask, rules=RULES)
    out = model.generate(
        ids, attention_mask=mask, logits_processor=[processor], max_new_tokens=12, do_sample=False
    )
    for row, (text, steps) in enumerate(zip(texts, processor.steps(out), strict=True)):
        context = text.tolist()
        generated = out[row, ids.shape[1] :].tolist()
        for n, (token, step) in enumerate(zip(generated, steps, strict=True)):
            log_p, lam = next_p(model, snapshot, gate, context, generated=n)
            assert token == log_p.argmax()
            assert step.token_id == token
            assert step.position == len(context)
            assert step.lam == pytest.approx(lam, abs=1e-4)
            assert np.log(step.p) == pytest.approx(log_p[token], abs=1e-4)
            if gate.space == "linear":
                assert step.responsibility == pytest.approx(lam * step.p_memory / step.p, abs=1e-4)
                assert step.p == pytest.approx((1 - lam) * step.p_model + lam * step.p_memory, rel=1e-3)
            else:
                assert step.responsibility is None
            context.append(token)
            if token == EOS:
                break
    known = [step for step in processor.steps(out)[0] if step]
    assert max(step.depth for step in known) >= 9
    assert "longest match" in summary(known)
    assert set(known[0].as_dict()) >= {"lam", "responsibility", "depth", "documents"}


def test_memory_can_end_a_text_only_where_it_may(model, snapshot):
    text = text_of(snapshot, 2, 40)
    ids = torch.tensor(text)[None]
    loud = FixedLambda(0.99, reading=LookupConfig(discount=0.1))
    ends = {}
    for end, eos in (("eos", EOS), ("nothing", None)):
        rules = TokenRules(n_tokens=V, n_logits=V, silent=(PAD, EOS), eos_id=eos)
        processor = memory_processor(snapshot, loud, ids, rules=rules)
        out = model.generate(ids, logits_processor=[processor], max_new_tokens=3, do_sample=False)
        ends[end] = int(out[0, 40])
    assert ends["eos"] == EOS
    assert ends["nothing"] != EOS
    # a minimum length forbids the end before memory is asked
    processor = memory_processor(snapshot, loud, ids, rules=RULES)
    out = model.generate(
        ids, logits_processor=[processor], min_new_tokens=2, max_new_tokens=3, do_sample=False
    )
    assert EOS not in out[0, 40:42].tolist()


@pytest.mark.parametrize("why", ["lambda 0", "empty index"])
def test_without_memory_every_bit_is_the_models(model, snapshot, why):
    ids, mask, _ = prompts(snapshot)
    memory = snapshot if why == "lambda 0" else Snapshot([], vocab_size=V)
    gate = FixedLambda(0.0) if why == "lambda 0" else a_gate()
    options = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_k": 20}):
        runs = []
        for processors in ([], [memory_processor(memory, gate, ids, mask, rules=RULES)]):
            torch.manual_seed(3)
            runs.append(model.generate(ids, logits_processor=processors, **options, **sampling))
        assert torch.equal(runs[0].sequences, runs[1].sequences)
        for plain, mixed in zip(runs[0].scores, runs[1].scores, strict=True):
            assert torch.equal(plain, mixed)


def test_temperature_and_penalties_stand_where_the_module_says(model, snapshot):
    ids, mask, texts = prompts(snapshot)
    gate = a_gate()
    processor = memory_processor(snapshot, gate, ids, mask, rules=RULES)
    got = model.generate(
        ids, attention_mask=mask, logits_processor=[processor], max_new_tokens=1, do_sample=True, temperature=0.5,
        top_k=0, repetition_penalty=1.7, return_dict_in_generate=True, output_scores=True,
    ).scores[0]  # fmt: skip
    for row, text in enumerate(texts):
        with torch.no_grad():
            logits = model(torch.tensor(text)[None]).logits[0, -1].numpy().copy()
        used = np.unique(text)
        logits[used] = np.where(logits[used] < 0, logits[used] * 1.7, logits[used] / 1.7)
        log_p, _ = mixed_log_p(logits, snapshot, gate, text, 0)
        wanted = log_p / 0.5
        found = got[row].numpy().astype(np.float64)
        np.testing.assert_allclose(
            found - np.logaddexp.reduce(found), wanted - np.logaddexp.reduce(wanted), atol=2e-3
        )


def test_beams_and_repeated_rows(model, snapshot):
    ids, mask, texts = prompts(snapshot)
    gate = a_gate()
    processor = memory_processor(snapshot, gate, ids, mask, rules=RULES)
    out = model.generate(
        ids, attention_mask=mask, logits_processor=[processor], num_beams=3, num_return_sequences=2, max_new_tokens=5,
        do_sample=False, early_stopping=False, length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert out.sequences.shape[0] == 4
    all_steps = processor.steps(out)
    for row in range(4):
        context, total = texts[row // 2].tolist(), 0.0
        for n, (token, step) in enumerate(zip(out.sequences[row, 9:].tolist(), all_steps[row], strict=True)):
            if token == PAD:
                break
            log_p, lam = next_p(model, snapshot, gate, context, generated=n)
            total += log_p[token]
            if step is not None:
                assert (step.token_id, step.lam) == (token, pytest.approx(lam, abs=1e-4))
            context.append(token)
        assert float(out.sequences_scores[row]) == pytest.approx(total, abs=2e-3)


def test_candidates_of_prompt_look_up_are_judged_by_the_mixture(model, snapshot):
    ids = torch.tensor(np.tile(text_of(snapshot, 0, 6), 2))[None]
    outs = []
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        processor = memory_processor(snapshot, a_gate(), ids, rules=RULES)
        outs.append(
            model.generate(ids, logits_processor=[processor], max_new_tokens=10, do_sample=False, **options)[
                0
            ].tolist()
        )
    assert outs[0] == outs[1]


def test_a_batch_decodes_as_its_rows_do_alone(model, snapshot):
    ids, mask, texts = prompts(snapshot)
    gate = a_gate()
    together = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False,
        logits_processor=[memory_processor(snapshot, gate, ids, mask, rules=RULES)],
    )  # fmt: skip
    for row, text in enumerate(texts):
        one = torch.tensor(text)[None]
        alone = model.generate(
            one,
            max_new_tokens=8,
            do_sample=False,
            logits_processor=[memory_processor(snapshot, gate, one, rules=RULES)],
        )
        n = alone.shape[1] - len(text)
        assert together[row, 9 : 9 + n].tolist() == alone[0, len(text) :].tolist()


def test_scores_of_a_text_are_those_of_decoding_it(model, snapshot):
    texts = [
        text_of(snapshot, 0, 30),
        np.concatenate([text_of(snapshot, 1, 8), [EOS], text_of(snapshot, 2, 5)]),
    ]
    T = 30
    ids, mask = np.full((3, T), PAD), np.zeros((3, T), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    ids[2, 0] = mask[2, 0] = 1
    for gate in (a_gate(), FixedLambda(0.3), FixedLambda(0.3, space="log")):
        result = score(
            model, torch.tensor(ids), snapshot, gate, rules=RULES, attention_mask=torch.tensor(mask)
        )
        for row, text in enumerate(texts):
            for t in range(1, len(text)):
                log_p, lam = next_p(model, snapshot, gate, text[:t])
                assert result.lam[row, t] == pytest.approx(lam, abs=1e-4)
                # two silent tokens of 258 are not shared out in scoring
                assert result.log_p[row, t] == pytest.approx(log_p[text[t]], abs=1e-2)
            assert np.isnan(result.log_p[row, len(text) :]).all()
        assert np.isnan(result.log_p[2]).all()
        assert result.perplexity() < result.perplexity(alone=True)
        if gate.space == "linear":
            shares = result.responsibility[0, 1:]
            assert ((shares >= 0) & (shares <= 1)).all()


def test_generated_text_counts_as_such_in_scoring_too(model, snapshot):
    ids, _, _ = prompts(snapshot)
    gate = a_gate()
    processor = memory_processor(snapshot, gate, ids[:1], rules=RULES)
    out = model.generate(ids[:1], logits_processor=[processor], max_new_tokens=6, do_sample=False)
    scored = score(model, out[0], snapshot, gate, rules=RULES, given=9)
    for step in processor.steps(out)[0]:
        assert scored.lam[0, step.position] == pytest.approx(step.lam, abs=1e-4)
        assert scored.responsibility[0, step.position] == pytest.approx(step.responsibility, abs=1e-2)


def test_rules_of_a_model(model, snapshot):
    rules = rules_of(tokenizer(), model, snapshot)
    assert rules == RULES
    assert rules_of(tokenizer(), model, snapshot, end="nothing").eos_id is None
    small = Snapshot([], vocab_size=1000)
    with pytest.raises(ConfigError, match="index has 1,000 token ids, the model 258 logits"):
        rules_of(tokenizer(), model, small)


def test_refusals(model, snapshot):
    ids, mask, _ = prompts(snapshot)
    processor = memory_processor(snapshot, a_gate(), ids, mask, rules=RULES, record="nothing")
    with pytest.raises(StateError, match="built for 2 prompts of 9 tokens; generate has 3 rows of 9"):
        processor(torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, V))
    with pytest.raises(ConfigError, match="model has 300 logits, the processor was built for 258"):
        processor(ids, torch.zeros(2, 300))
    with pytest.raises(ConfigError, match='record="nothing"'):
        processor.steps(ids)
    with pytest.raises(ConfigError, match="at least one row"):
        memory_processor(snapshot, a_gate(), ids[0], rules=RULES)
    with pytest.raises(ConfigError, match="mask has shape"):
        memory_processor(snapshot, a_gate(), ids, mask[:1], rules=RULES)
    with pytest.raises(ConfigError, match="needs tokenizer and model"):
        memory_processor(snapshot, a_gate(), ids, mask)
    with pytest.raises(ConfigError, match="index has 20 token ids, the token rules are for 258"):
        score(model, ids, Snapshot([], vocab_size=20), a_gate(), rules=RULES)
    with pytest.raises(TokenIdError, match="padded on the right"):
        score(model, ids, snapshot, a_gate(), rules=RULES, attention_mask=mask)


def test_gates_of_another_model_or_tokenizer_are_refused(model, snapshot):
    from engram_lm.identity import fingerprint_of, tokenizer_fingerprint

    ids, mask, _ = prompts(snapshot)
    right = {"model": fingerprint_of(model), "tokenizer": tokenizer_fingerprint(tokenizer())}
    made = memory_processor(snapshot, a_gate(**right), ids, mask, tokenizer=tokenizer(), model=model)
    assert made.rules == RULES
    for name in right:
        wrong = a_gate(**{**right, name: "0" * 64})
        with pytest.raises(IdentityError, match="was fitted for"):
            memory_processor(snapshot, wrong, ids, mask, tokenizer=tokenizer(), model=model)
    # weights that have changed since are looked at again
    with torch.no_grad():
        weight = model.lm_head.weight
        weight.mul_(2)
        try:
            with pytest.raises(IdentityError, match="was fitted for"):
                memory_processor(snapshot, a_gate(**right), ids, mask, tokenizer=tokenizer(), model=model)
        finally:
            weight.mul_(0.5)


def test_the_shipped_gate_is_for_smollm2_and_within_its_bound():
    from engram_lm.bases.smollm2 import WEIGHTS_SHA256
    from engram_lm.mixing import default_gate

    gate = default_gate("smollm2")
    assert (gate.model, gate.model_name, gate.kind) == (WEIGHTS_SHA256, "smollm2", "logistic")
    assert gate.measured["worst_general"] <= gate.measured["bound"] == 0.005
    assert gate.reading == LookupConfig(count="documents")
    # nothing in common with the index, a word in common, a passage in common
    from engram_lm.mixing.features import Evidence, features

    seen = Evidence.of(
        depth=[0, 2, 30], generated=[0] * 3, count=[10**5, 20, 1], distinct=[9000, 12, 1], count_below=[10**5, 300, 1],
        distinct_below=[9000, 90, 1], documents=[64, 9, 1], memory_entropy=[7.0, 2.3, 0.0], top_p=[0.04, 0.2, 0.99],
        model_entropy=[3.0] * 3, model_top_logp=[-1.0] * 3, model_logp_of_top=[-4.0, -3.0, -5.0], same_top=[False] * 3,
    )  # fmt: skip
    nothing, word, passage = gate.lambdas(features(seen, tokens=10**5))
    assert nothing < 0.01 < word < 0.2
    assert passage > 0.6


def test_examples_leave_the_document_out_and_vary_the_index(model, snapshot):
    from engram_lm.errors import DataError
    from engram_lm.mixing import calibrate, collect, fit_gate

    general = [np.random.default_rng(n).integers(2, V, 40) for n in range(4)]
    seen = []
    fit, bound = collect(
        model,
        snapshot,
        general,
        rules=RULES,
        sizes=(1, 3, None),
        texts=5,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(n, 9) for n in range(1, 10)]
    assert set(fit.groups) == {"documents, 1", "documents, 3", "documents, all", "general text"}
    assert (bound.groups, bound.general) == (("general text",), (True,))
    # the one document of the smallest index has nothing to be looked up in
    assert np.bincount(fit.group)[fit.groups.index("documents, 1")] in (4 * 39, 3 * 39 + 34)
    # random documents hold each other's pairs of tokens at most, but for one that was made of two others
    deep = fit.features[fit.group == fit.groups.index("documents, all")][:, NAMES.index("depth>=9")].sum()
    assert 0 < deep < 5 * 39 / 2
    gate = calibrate(fit_gate(fit, steps=20), bound)
    assert gate.measured["worst_general"] <= 0.005
    with pytest.raises(
        DataError, match="at least 2 documents in the index and 2 general texts of 32 tokens; got 6 and 0"
    ):
        collect(model, snapshot, [], rules=RULES)
