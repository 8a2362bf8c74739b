"""Memory in vLLM, without vLLM: what may be set, which request is in which row, and rows mixed as in transformers."""

import importlib
import logging
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from engram_lm.errors import CheckpointError, ConfigError, IdentityError, MissingExtraError, StateError
from engram_lm.identity import tokenizer_fingerprint
from engram_lm.index.store import Index
from engram_lm.mixing import FixedLambda, memory_processor
from engram_lm.mixing.features import NAMES
from engram_lm.mixing.gate import Gate
from engram_lm.tenancy import new_key, sign
from engram_lm.vllm import live as live_module
from engram_lm.vllm import plugin
from engram_lm.vllm.live import Live, Part, Row, mix_here, mix_there
from engram_lm.vllm.options import RequestOptions, Settings, options_of, settings_of
from engram_lm.vllm.slots import rows_of
from models import EOS, tokenizer
from places import ROOT

V, M = 264, 258
SWAP, ONE_WAY = SimpleNamespace(name="SWAP"), SimpleNamespace(name="UNIDIRECTIONAL")


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.fixture
def directory(tmp_path, words):
    rng = np.random.default_rng(0)
    with Index.create(tmp_path / "index", vocab_size=M, tokenizer=tokenizer_fingerprint(words)) as store:
        store.add([(name, rng.integers(2, M, 40)) for name in "abc"])
        store.add([("secret", rng.integers(2, M, 40))], tenant="acme")
    return tmp_path / "index"


def a_live(directory, words, **changes):
    facts = {"index": str(directory), "lam": 0.4, **changes}
    return Live(Settings(**facts), tokenizer=words, n_logits=V, eos_id=EOS, model=lambda: "f" * 64)


def a_gate(**changes):
    F = len(NAMES)
    w = np.zeros(F)
    w[NAMES.index("depth")], w[NAMES.index("model entropy")], w[NAMES.index("fresh")] = 1.0, 0.1, -0.3
    facts = {
        "kind": "logistic", "mean": np.zeros(F), "scale": np.ones(F), "low": np.full(F, -50.0), "high": np.full(F, 50.0),
        "weights": {"w": w, "b": np.array(-1.5)},
    }  # fmt: skip
    return Gate(**{**facts, **changes})


def contexts_of(directory, tenant="public"):
    """Three contexts that memory knows more and less of."""
    with Index.open(directory) as store:
        tokens = {document.id: store.get(document.id, tenant)[1] for document in store.documents(tenant)}
    first = next(iter(tokens.values()))
    return [first[:12], first[20:23], np.array([5, 6])]


# ---- settings and options -------------------------------------------------------------------------------------------------


def test_settings_come_from_one_place():
    assert settings_of({}, {}) is None
    assert settings_of(None, {"ENGRAM_INDEX": ""}) is None
    assert settings_of({"other": 1}, {}) is None
    said = settings_of(
        {}, {"ENGRAM_INDEX": "notes", "ENGRAM_LAMBDA": "0.25", "ENGRAM_TENANTS": "public, acme"}
    )
    assert said == Settings(index="notes", lam=0.25, tenants=("public", "acme"))
    said = settings_of(
        {"engram": {"index": "notes", "gate": "g.json", "model": "trust", "most_verbatim": 40}}, {}
    )
    assert said == Settings(index="notes", gate="g.json", model="trust", most_verbatim=40)


@pytest.mark.parametrize(
    ("config", "environ", "message"),
    [
        ({"engram": {"index": "a", "lambda": 0.1}}, {"ENGRAM_INDEX": "b"}, "leave one of them out"),
        ({"engram": "notes"}, {}, "is an object; got str"),
        ({"engram": {"indx": "a"}}, {}, "has no key 'indx'; it has index, gate"),
        ({}, {"ENGRAM_GATE": "g"}, "but no index: set ENGRAM_INDEX"),
        ({}, {"ENGRAM_INDEX": "a"}, "a gate or a fixed lambda"),
        ({}, {"ENGRAM_INDEX": "a", "ENGRAM_GATE": "g", "ENGRAM_LAMBDA": "0.1"}, "a gate or a fixed lambda"),
        ({}, {"ENGRAM_INDEX": "a", "ENGRAM_LAMBDA": "x"}, "ENGRAM_LAMBDA is a number; got 'x'"),
        ({}, {"ENGRAM_INDEX": "a", "ENGRAM_LAMBDA": "1"}, "less than 1; got 1.0"),
        ({}, {"ENGRAM_INDEX": "a", "ENGRAM_LAMBDA": "nan"}, "less than 1; got nan"),
        ({"engram": {"index": "a", "lambda": True}}, {}, "less than 1; got True"),
        ({}, {"ENGRAM_INDEX": "a", "ENGRAM_LAMBDA": "0.1", "ENGRAM_MODEL": "trust"}, "fits every model"),
        ({}, {"ENGRAM_INDEX": "a", "ENGRAM_GATE": "g", "ENGRAM_MODEL": "maybe"}, "check or trust; got 'maybe'"),
        ({}, {"ENGRAM_INDEX": "a", "ENGRAM_GATE": "g", "ENGRAM_MOST_VERBATIM": "0"}, "at least 1; got 0"),
        ({}, {"ENGRAM_INDEX": "a", "ENGRAM_GATE": "g", "ENGRAM_KEY_FILE": "/none"}, "/none: no key can be read"),
        ({"engram": {"index": "a", "lambda": 0.1, "tenants": ["x"], "key_file": "k"}}, {}, "one of them"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(config, environ, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(config, environ)


def test_options_of_a_request():
    assert options_of(None) == options_of({"other": 1}) == RequestOptions()
    assert options_of({"engram_lambda": 0}) == RequestOptions(lam=0.0)
    assert options_of({"engram_documents": ["b", "a", "b"]}).documents == ("b", "a")
    assert "secret" not in repr(options_of({"engram_token": "secret"}))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"engram_lambda": 1}, "engram_lambda is at least 0 and less than 1; got 1"),
        ({"engram_lambda": "0.1"}, "got '0.1'"),
        ({"engram_lambda": True}, "got True"),
        ({"engram_documents": "a"}, "a list of 1 to 64 document ids; got a"),
        ({"engram_documents": []}, "a list of 1 to 64"),
        ({"engram_documents": [1]}, "a list of 1 to 64"),
        ({"engram_documents": ["a"], "engram_lambda": 0}, "has no effect"),
        ({"engram_tenant": "acme"}, "whose documents a request sees is the server's"),
        ({"engram_tenants": ["acme"]}, "whose documents a request sees is the server's"),
        ({"engram_lamda": 0.1}, "no option 'engram_lamda'; a request may say"),
        ({"engram": {"lambda": 0}}, "no option 'engram'"),
        ({"engram_token": 5}, "engram_token is a text"),
    ],
)
def test_options_that_cannot_be_are_refused(said, message):
    with pytest.raises(ConfigError, match=message):
        plugin.MemoryLogitsProcessor.validate_params(SimpleNamespace(extra_args=said))


# ---- whose documents --------------------------------------------------------------------------------------------------


def test_only_a_signed_token_opens_a_tenants_documents(directory, words, tmp_path, monkeypatch, caplog):
    key, other = new_key(), new_key()
    (tmp_path / "key").write_text(key)
    live = a_live(directory, words, tenants=None, key_file=str(tmp_path / "key"))
    token = sign("acme", key, seconds=60)
    assert live.part(RequestOptions()) is None
    assert live.part(RequestOptions(token=token)).tenants == ("acme",)
    with caplog.at_level(logging.WARNING, logger="engram_lm.vllm"):
        assert live.part(RequestOptions(token=sign("acme", other, seconds=60))) is None
    assert "not signed with this server's key" in caplog.text
    # where the process that takes requests has the settings, a bad token is an error there
    monkeypatch.setenv("ENGRAM_INDEX", str(directory))
    monkeypatch.setenv("ENGRAM_LAMBDA", "0.1")
    ask = plugin.MemoryLogitsProcessor.validate_params
    with pytest.raises(ConfigError, match="no effect here"):
        ask(SimpleNamespace(extra_args={"engram_token": token}))
    monkeypatch.setenv("ENGRAM_KEY_FILE", str(tmp_path / "key"))
    ask(SimpleNamespace(extra_args={"engram_token": token}))
    with pytest.raises(ConfigError, match="not signed with"):
        ask(SimpleNamespace(extra_args={"engram_token": token[:-1] + ("A" if token[-1] != "A" else "B")}))


def test_another_tenants_documents_change_no_bit(directory, words):
    (context, *_), logits = contexts_of(directory, "acme"), torch.randn(1, V)
    live, seen = a_live(directory, words), []
    for _ in range(2):
        mixed = logits.clone()
        live.step(mixed, [Row(at=0, last=context, generated=0, part=live.part(RequestOptions()))])
        seen.append(mixed)
        with Index.open(directory, "write") as store:
            store.add([("more", context)], tenant="acme", replace="yes")
    assert torch.equal(*seen)


# ---- rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["fixed", "gate"])
def test_rows_are_mixed_as_in_transformers(directory, words, tmp_path, which):
    gate = FixedLambda(0.4)
    if which == "gate":
        gate = a_gate(tokenizer=tokenizer_fingerprint(words), model="f" * 64)
        gate.save(tmp_path / "gate.json")
    live = a_live(
        directory, words, **({} if which == "fixed" else {"lam": None, "gate": str(tmp_path / "gate.json")})
    )
    logits, contexts = torch.randn(5, V) * 3, contexts_of(directory)
    logits[1, :200] = -torch.inf
    mixed = logits.clone()
    part, off = live.part(RequestOptions()), live.part(RequestOptions(lam=0.0))
    assert off is None
    live.step(
        mixed,
        [
            Row(at=at, last=context, generated=2, part=part)
            for at, context in zip([0, 1, 4], contexts, strict=True)
        ],
    )
    assert torch.equal(mixed[2:4], logits[2:4])
    for at, context in zip([0, 1, 4], contexts, strict=True):
        prompt = torch.tensor(context[:-2].astype(np.int64))[None]
        processor = memory_processor(
            Index.open(directory).snapshot(), gate, prompt, rules=live.rules, record="nothing"
        )
        whole = torch.tensor(context.astype(np.int64))[None]
        assert torch.allclose(mixed[at], processor(whole, logits[at : at + 1])[0], atol=1e-6)
        assert not torch.equal(mixed[at], logits[at])


def test_requests_with_different_options_share_a_step(directory, words):
    live, logits = a_live(directory, words), torch.randn(4, V)
    context = contexts_of(directory)[0]
    options = [RequestOptions(), RequestOptions(lam=0.9), RequestOptions(documents=("b", "nobody's")),
               RequestOptions(documents=("nobody's",))]  # fmt: skip
    rows = [Row(at=at, last=context, generated=0, part=live.part(said)) for at, said in enumerate(options)]
    together = logits.clone()
    live.step(together, rows)
    for row in rows:
        alone = logits.clone()
        live.step(alone, [row])
        assert torch.equal(alone[row.at], together[row.at])
    assert torch.equal(together[3], logits[3])
    snapshot = Index.open(directory).snapshot().restricted(["b"])
    processor = memory_processor(
        snapshot, FixedLambda(0.4), torch.tensor(context.astype(np.int64))[None], rules=live.rules
    )
    whole = torch.tensor(context.astype(np.int64))[None]
    assert torch.allclose(together[2], processor(whole, logits[2:3])[0], atol=1e-6)


def test_documents_too_large_to_sort_in_a_step_are_no_memory(directory, words, monkeypatch, caplog):
    monkeypatch.setattr(live_module, "MOST_TOKENS", 60)
    live, logits = a_live(directory, words), torch.randn(1, V)
    for names, changed in ((("a",), True), (("a", "b"), False)):
        mixed = logits.clone()
        part = live.part(RequestOptions(documents=names))
        live.step(mixed, [Row(at=0, last=np.array([7, 8]), generated=0, part=part)])
        assert torch.equal(mixed, logits) != changed
    assert "documents of 80 tokens, at most 60" in caplog.text


def test_silent_after_so_many_tokens_of_a_documents_own(directory, words):
    context, logits = contexts_of(directory)[0], torch.randn(1, V)
    for most, generated, silent in ((5, 5, True), (5, 4, False), (6, 5, False)):
        live, mixed = a_live(directory, words, most_verbatim=most), logits.clone()
        live.step(mixed, [Row(at=0, last=context, generated=generated, part=live.part(RequestOptions()))])
        assert torch.equal(mixed, logits) == silent


def test_changes_are_seen_at_the_next_step_and_a_lost_index_is_no_error(directory, words, caplog):
    live, logits = a_live(directory, words), torch.randn(1, V)
    part = live.part(RequestOptions())

    def now():
        mixed = logits.clone()
        live.step(mixed, [Row(at=0, last=np.array([9, 9, 9]), generated=0, part=part)])
        return mixed

    before = now()
    with Index.open(directory, "write") as store:
        store.add([("new", [9, 9, 9, 77, 9, 9, 9, 77])])
        added = now()
        store.delete("new")
        assert torch.equal(now(), before)
    assert (added - before)[0, 77] > 1
    hidden = directory.rename(directory.with_name("hidden"))
    with caplog.at_level(logging.WARNING, logger="engram_lm.vllm"):
        assert torch.equal(now(), logits)
        assert torch.equal(now(), logits)
        hidden.rename(directory)
        assert torch.equal(now(), before)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("No memory until the index can be read again")
    assert "is read again" in lines[1]


def test_what_does_not_fit_is_refused_when_the_server_starts(directory, words, tmp_path):
    with pytest.raises(CheckpointError):
        a_live(tmp_path / "none", words)
    with pytest.raises(CheckpointError, match="no gate can be read here"):
        a_live(directory, words, lam=None, gate=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="No gate is shipped for 'other'"):
        a_live(directory, words, lam=None, gate="other")
    with pytest.raises(IdentityError, match="fitted for the tokenizer"):
        a_live(directory, words, lam=None, gate="smollm2")
    fitted = a_gate(tokenizer=tokenizer_fingerprint(words), model="e" * 64).save(tmp_path / "gate.json")
    with pytest.raises(IdentityError, match="not for ffffffffffff"):
        a_live(directory, words, lam=None, gate=str(fitted))
    a_live(directory, words, lam=None, gate=str(fitted), model="trust")
    with Index.create(tmp_path / "other", vocab_size=M, tokenizer="another"):
        pass
    with pytest.raises(IdentityError, match="another"):
        a_live(tmp_path / "other", words)


@given(seed=st.integers(0, 10_000), lam=st.sampled_from([0.0, 0.01, 0.5, 0.99]), forbid=st.booleans())
def test_on_a_device_rows_are_the_same(seed, lam, forbid):
    draw = np.random.default_rng(seed)
    logits = torch.from_numpy(draw.normal(0, 4, (4, V)).astype(np.float32))
    if forbid:
        logits[:, draw.integers(0, V, V // 2)] = -torch.inf
    logits[3] = -torch.inf
    q_R = [(draw.dirichlet(np.full(M, 0.1)) * 0.9).astype(np.float32) for _ in range(3)]
    top_R = np.array([int(q.argmax()) for q in q_R])
    top_R[1] = -1
    seen, mixed = [], []
    for way in (mix_here, mix_there):
        out = logits.clone()

        def lambdas(survey_R6):
            seen.append(survey_R6.copy())
            return np.where(np.isfinite(survey_R6[:, 5]), [lam, 0.0, lam], 0.0)

        way(out, [2, 0, 3], q_R, top_R, lambdas)
        mixed.append(out)
    np.testing.assert_allclose(seen[0][:2], seen[1][:2], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(*mixed, atol=2e-5, rtol=1e-5)
    assert torch.equal(mixed[1][[0, 1, 3]], logits[[0, 1, 3]])


# ---- vLLM's two interfaces ------------------------------------------------------------------------------------------------


def a_config(**changes):
    class Config(SimpleNamespace):  # can be referred to weakly
        __hash__ = object.__hash__

    facts = {
        "additional_config": {"engram": {"index": "x", "lambda": 0.4}},
        "parallel_config": SimpleNamespace(tensor_parallel_size=1),
        "scheduler_config": SimpleNamespace(async_scheduling=False),
        "model_config": SimpleNamespace(logits_processors=None),
    }
    return Config(**{**facts, **changes})


@pytest.fixture
def made(directory, words, monkeypatch):
    """A processor as vLLM makes it, for either interface."""
    monkeypatch.setattr(plugin, "_bases", lambda: (object,))
    monkeypatch.setattr(plugin, "_live_of", lambda settings, config: a_live(directory, words))
    monkeypatch.setattr(plugin, "_MADE", [])
    return lambda *given, **changes: plugin.MemoryLogitsProcessor(a_config(**changes), *given)


def test_installed_it_is_found_loads_nothing_and_does_nothing(monkeypatch):
    root = ROOT
    group = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    module, name = group["vllm.logits_processors"]["engram"].split(":")
    code = f"import sys, {module} as m; m.{name}; print(sorted({{'torch', 'numpy', 'numba', 'vllm'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    cls = getattr(importlib.import_module(module), name)
    for name in ("ENGRAM_INDEX", "ENGRAM_GATE", "ENGRAM_LAMBDA"):
        monkeypatch.delenv(name, raising=False)
    logits = torch.randn(2, V)
    first, second = (
        cls(a_config(additional_config={}), "cpu", False),
        cls(a_config(additional_config={}), object()),
    )
    assert first.is_argmax_invariant()
    first.update_state(SimpleNamespace(removed=[], added=[(0, None, [1], [])], moved=[]))
    assert not second.add_request(0, SimpleNamespace(extra_args=None))
    second.apply_staged_writes()
    assert first.apply(logits) is logits
    assert second.apply(logits, object()) is logits
    with pytest.raises(MissingExtraError, match="needs vLLM"):
        cls(a_config(), "cpu", False)


def test_what_would_give_wrong_answers_is_refused(made):
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2"):
        made("cpu", False, parallel_config=SimpleNamespace(tensor_parallel_size=2))
    later = SimpleNamespace(async_scheduling=True)
    with pytest.raises(ConfigError, match="--no-async-scheduling"):
        made("cpu", False, scheduler_config=later)
    made(SimpleNamespace(), scheduler_config=later)
    named = SimpleNamespace(logits_processors=["engram_lm.vllm:MemoryLogitsProcessor"])
    processor = made("cpu", False, scheduler_config=later, model_config=named)
    output = []
    processor.update_state(
        SimpleNamespace(removed=[], added=[(0, SimpleNamespace(extra_args=None), [5], output)], moved=[])
    )
    output.append(-1)
    with pytest.raises(StateError, match="--no-async-scheduling"):
        processor.apply(torch.randn(1, V))
    with pytest.raises(StateError, match=f"vLLM gives {V + 1} logits"):
        processor.apply(torch.randn(1, V + 1))


def test_named_twice_it_mixes_once(made):
    config = a_config()
    first = plugin.MemoryLogitsProcessor(config, "cpu", False)
    second = plugin.MemoryLogitsProcessor(config, "cpu", False)
    assert not first.is_argmax_invariant()
    assert second.is_argmax_invariant()
    assert not plugin.MemoryLogitsProcessor(a_config(), "cpu", False).is_argmax_invariant()


@settings(max_examples=25)
@given(data=st.data())
def test_version_1_follows_the_batch(data):
    """Against a list of rows that changes as vLLM's batch does: removals leave holes, additions fill them, the last rows
    close what is left, and rows are swapped."""
    processor = plugin.MemoryLogitsProcessor.__new__(plugin.MemoryLogitsProcessor)
    processor._requests, asked = {}, []
    processor._live = SimpleNamespace(
        max_order=6, rules=SimpleNamespace(n_logits=V),
        part=lambda options: None if options.lam == 0 else ("part", options.lam),
        step=lambda logits, rows: asked.append({row.at: (row.last.tolist(), row.generated, row.part) for row in rows}),
    )  # fmt: skip
    batch, number = [], 10
    for _ in range(data.draw(st.integers(1, 8))):
        removed = sorted(data.draw(st.sets(st.integers(0, len(batch) - 1))), reverse=True) if batch else []
        for at in removed:
            batch[at] = None
        holes, added, moved = sorted(removed), [], []
        for _ in range(data.draw(st.integers(0, 3))):
            lam = data.draw(st.sampled_from([None, 0, 0.5]))
            extra = {} if lam is None else {"engram_lambda": lam}
            prompt, output = list(range(number, number + data.draw(st.integers(0, 9)))), []
            number += 10
            at = holes.pop(0) if holes else len(batch)
            batch[at : at + 1] = [(prompt, output, lam)]
            added.append((at, SimpleNamespace(extra_args=extra), prompt, output))
        for at in holes:
            while batch and batch[-1] is None:
                batch.pop()
            if at < len(batch):
                moved.append((len(batch) - 1, at, ONE_WAY))
                batch[at] = batch.pop()
        left = [at for at in removed if at not in {a for a, *_ in added}]
        if len(batch) > 1 and data.draw(st.booleans()):
            a, b = data.draw(st.permutations(range(len(batch))))[:2]
            batch[a], batch[b] = batch[b], batch[a]
            moved.append((a, b, SWAP))
        nothing = not (left or added or moved)
        processor.update_state(None if nothing else SimpleNamespace(removed=left, added=added, moved=moved))
        processor.apply(torch.zeros(len(batch), V))
        assert asked.pop() == {
            at: ((prompt + output)[-6:], len(output), ("part", lam))
            for at, (prompt, output, lam) in enumerate(batch) if lam != 0
        }  # fmt: skip
        for _, output, _ in batch:
            output.append(number)
            number += 1


@settings(max_examples=25)
@given(data=st.data())
def test_version_2_reads_tokens_and_drafts(data):
    slots, longest, K = 6, 40, 8
    draw = np.random.default_rng(data.draw(st.integers(0, 1000)))
    tokens = torch.from_numpy(draw.integers(2, M, (slots, longest)).astype(np.int32))
    total, prompt = torch.zeros(slots, dtype=torch.int32), torch.zeros(slots, dtype=torch.int32)
    known = {slot: Part(("public",), None, slot / 10) for slot in range(slots) if data.draw(st.booleans())}
    order = data.draw(st.permutations(range(slots)))[: data.draw(st.integers(1, slots))]
    expanded, local, pos, inputs, wanted = [], [], [], [], {}
    for slot in order:
        total[slot] = n = data.draw(st.integers(1, 20))
        prompt[slot] = data.draw(st.integers(1, n))
        text = tokens[slot, :n].tolist()
        if data.draw(st.booleans()) and n > 1:  # a part of the prompt: its row is not used
            expanded.append(slot), local.append(0), pos.append(n - 2), inputs.append(text[-2])
            continue
        drafts = draw.integers(2, M, data.draw(st.integers(0, 3))).tolist()
        for j in range(len(drafts) + 1):
            if slot in known:
                context = text[-K:] + drafts[:j]
                wanted[len(expanded)] = (context, n + j - int(prompt[slot]), known[slot])
            (
                expanded.append(slot),
                local.append(j),
                pos.append(n - 1 + j),
                inputs.append((text[-1:] + drafts)[j]),
            )
    states = SimpleNamespace(
        total_len=SimpleNamespace(gpu=total), prompt_len=SimpleNamespace(gpu=prompt),
        all_token_ids=SimpleNamespace(gpu=tokens),
    )  # fmt: skip
    ctx = SimpleNamespace(
        expanded_idx_mapping=torch.tensor(expanded), expanded_local_pos=torch.tensor(local), pos=torch.tensor(pos),
        input_ids=torch.tensor(inputs, dtype=torch.int32), idx_mapping_np=np.array(order),
    )  # fmt: skip
    rows = rows_of(states, ctx, known, max_order=K)
    assert {row.at: (row.last.tolist(), row.generated, row.part) for row in rows} == wanted


def test_version_2_mixes_what_version_1_does(made, directory):
    context, logits = contexts_of(directory)[0].astype(int).tolist(), torch.randn(2, V)
    params = SimpleNamespace(extra_args=None)
    one = made("cpu", False)
    one.update_state(SimpleNamespace(removed=[], added=[(1, params, context[:-2], context[-2:])], moved=[]))
    tokens = torch.zeros(3, 30, dtype=torch.int32)
    tokens[2, : len(context)] = torch.tensor(context)
    lengths = [torch.tensor([0, 0, n], dtype=torch.int32) for n in (len(context), len(context) - 2)]
    two = made(
        SimpleNamespace(
            all_token_ids=SimpleNamespace(gpu=tokens), total_len=SimpleNamespace(gpu=lengths[0]),
            prompt_len=SimpleNamespace(gpu=lengths[1]),
        )
    )  # fmt: skip
    assert not two.add_request(0, SimpleNamespace(extra_args={"engram_lambda": 0}))
    assert two.add_request(2, params)
    ctx = SimpleNamespace(
        expanded_idx_mapping=torch.tensor([0, 2]), expanded_local_pos=torch.tensor([0, 0]),
        pos=torch.tensor([0, len(context) - 1]), input_ids=torch.tensor([0, context[-1]]), idx_mapping_np=np.array([0, 2]),
    )  # fmt: skip
    mixed = one.apply(logits.clone())
    assert torch.equal(mixed, two.apply(logits.clone(), ctx))
    assert torch.equal(mixed[0], logits[0])
    assert not torch.equal(mixed[1], logits[1])
    # the slot's next request has switched memory off
    assert not two.add_request(2, SimpleNamespace(extra_args={"engram_lambda": 0}))
    assert torch.equal(two.apply(logits.clone(), ctx), logits)
