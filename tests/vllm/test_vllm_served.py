"""A small model served by vLLM with an index, token for token what transformers says with the same memory.

Runs the Python that ENGRAM_VLLM_PYTHON names (docs/vllm.md says how to make that environment).
"""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
import transformers as hf

from engram_lm.identity import tokenizer_fingerprint
from engram_lm.index.store import Index
from engram_lm.mixing import FixedLambda, memory_processor
from engram_lm.mixing.features import NAMES
from engram_lm.mixing.gate import Gate
from engram_lm.mixing.identity import model_print
from models import EOS, PAD, tokenizer
from places import ROOT, SUPPORT

PYTHON = os.environ.get("ENGRAM_VLLM_PYTHON", "")
V = 258

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="ENGRAM_VLLM_PYTHON names no Python that has vLLM"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model, an index and a gate; a path with a blank in it."""
    place = tmp_path_factory.mktemp("served by vllm")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=V, num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=128, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None, initializer_range=0.15,
        dtype="float32",
    )  # fmt: skip
    model, words = hf.LlamaForCausalLM(config).eval(), tokenizer()
    model.save_pretrained(place / "model")
    words.save_pretrained(place / "model")
    rng = np.random.default_rng(0)
    with Index.create(place / "index", vocab_size=V, tokenizer=tokenizer_fingerprint(words)) as store:
        store.add([(name, rng.integers(2, V, 40)) for name in "abcd"])
        store.add([("secret", rng.integers(2, V, 40))], tenant="acme")
    F = len(NAMES)
    w = np.zeros(F)
    w[NAMES.index("depth")], w[NAMES.index("model entropy")], w[NAMES.index("fresh")] = 1.0, 0.1, -0.3
    gate = Gate(
        kind="logistic", mean=np.zeros(F), scale=np.ones(F), low=np.full(F, -50.0), high=np.full(F, 50.0),
        weights={"w": w, "b": np.array(-1.5)}, tokenizer=tokenizer_fingerprint(words), model=model_print(model),
    )  # fmt: skip
    gate.save(place / "gate.json")
    return place


def served(place, runner, engram, batches):
    request = place / "request.json"
    asked = {"model": str(place / "model"), "runner": runner, "engram": engram, "batches": batches}
    request.write_text(json.dumps(asked))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
    }
    for name in ("ENGRAM_INDEX", "ENGRAM_GATE", "ENGRAM_LAMBDA"):
        environment.pop(name, None)
    done = subprocess.run(
        [PYTHON, str(SUPPORT / "vllm_served.py"), str(request)], capture_output=True, text=True, env=environment,
        check=False, cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["interface"] == (runner if engram else None)
    return found["said"]


def wanted(model, words, ids, n, snapshot, gate):
    """Tokens that transformers generates, and their log-probabilities in the mixture."""
    prompt = torch.tensor(ids)[None]
    processors = (
        [] if gate is None else [memory_processor(snapshot, gate, prompt, tokenizer=words, model=model)]
    )
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), logits_processor=processors, max_new_tokens=n, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    tokens = out.sequences[0, len(ids) :].tolist()
    if processors:
        return tokens, [np.log(step.p) for step in processors[0].steps(out)[0]]
    log_p = [
        torch.log_softmax(logits[0], 0)[token].item()
        for logits, token in zip(out.logits, tokens, strict=True)
    ]
    return tokens, log_p


@pytest.mark.parametrize("runner", [1, 2])
def test_every_token_is_transformers(place, runner):
    model = hf.AutoModelForCausalLM.from_pretrained(place / "model").eval()
    words = hf.AutoTokenizer.from_pretrained(place / "model")
    snapshot = Index.open(place / "index").snapshot()
    gate = Gate.load(place / "gate.json")
    texts = [snapshot.views[0].segment.document_tokens(d).astype(int).tolist() for d in range(4)]
    prompts = [texts[0][:9], texts[1][5:8], [7, 8, 9], texts[2][30:39], texts[3][:20], [20, 21]]
    kinds = [
        (None, snapshot, gate),
        ({"engram_lambda": 0}, snapshot, None),
        ({"engram_lambda": 0.4}, snapshot, FixedLambda(0.4)),
        ({"engram_documents": ["b", "d", "nobody's"]}, snapshot.restricted(["b", "d"]), gate),
    ]
    # more requests than places in the batch (4), of unequal length: rows are removed, filled and moved
    batch, answers = [], []
    for i in range(24):
        ids, (extra_args, seen, chosen) = prompts[i % 6], kinds[(i * 5 + i // 4) % 4]
        n = 3 + (i * 7) % 13
        batch.append({"ids": ids, "extra_args": extra_args, "max_tokens": n})
        answers.append(wanted(model, words, ids, n, seen, chosen))
    refused = [[{"ids": [5, 6], "extra_args": said, "max_tokens": 1}] for said in
               ({"engram_lambda": 1}, {"engram_tenant": "acme"}, {"engram_documents": "b"})]  # fmt: skip
    settings = {"index": str(place / "index"), "gate": str(place / "gate.json")}
    said, *errors, again = served(place, runner, settings, [batch, *refused, batch[:4]])
    for one, (tokens, log_p) in zip([*said, *again], [*answers, *answers[:4]], strict=True):
        assert one["tokens"] == tokens
        np.testing.assert_allclose(one["log_p"], log_p, atol=1e-4)
    different = [one["tokens"] != wanted(model, words, ask["ids"], ask["max_tokens"], snapshot, None)[0]
                 for one, ask in zip(said, batch, strict=True)]  # fmt: skip
    assert 6 <= sum(different) < len(batch)
    for error, words_of_it in zip(
        errors, ("less than 1; got 1", "a signed engram_token's", "a list of 1 to 64"), strict=True
    ):
        assert words_of_it in error["error"]


@pytest.mark.parametrize("runner", [1, 2])
def test_installed_and_not_set_up_it_changes_nothing(place, runner):
    model = hf.AutoModelForCausalLM.from_pretrained(place / "model").eval()
    words = hf.AutoTokenizer.from_pretrained(place / "model")
    snapshot = Index.open(place / "index").snapshot()
    batch = [{"ids": [7, 8, 9], "extra_args": None, "max_tokens": 9}]
    ((one,),) = served(place, runner, None, [batch])
    tokens, log_p = wanted(model, words, [7, 8, 9], 9, snapshot, None)
    assert one["tokens"] == tokens
    np.testing.assert_allclose(one["log_p"], log_p, atol=1e-4)
