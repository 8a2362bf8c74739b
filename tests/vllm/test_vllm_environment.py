"""What is promised beside vLLM: errors, extras, config, kernels, vocab, index, mixing and vllm, with vLLM's older numba,
numpy and transformers. Runs that environment's Python, named by ENGRAM_VLLM_PYTHON (docs/vllm.md says how to make one).
"""

import json
import os
import subprocess

import pytest

from places import ROOT

PYTHON = os.environ.get("ENGRAM_VLLM_PYTHON", "")
SOURCE = ROOT / "src"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="ENGRAM_VLLM_PYTHON names no Python that has vLLM"),
]

PROGRAM = r"""
import importlib, json, pkgutil, sys, tempfile
import numba, numpy, transformers

def modules(name):
    module = importlib.import_module(name)
    yield name
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        importlib.import_module(found.name)
        yield found.name

loaded = [m for room in ("errors", "extras", "config", "kernels", "vocab", "index", "mixing", "vllm", "tenancy")
          for m in modules("engram_lm." + room)]

import numpy as np, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from engram_lm.index.store import Index
from engram_lm.mixing import FixedLambda, default_gate, memory_processor, score, token_rules
from engram_lm.mixing.mix import mix_plain
from engram_lm.vllm import Live, MemoryLogitsProcessor, Settings
from engram_lm.vllm.live import Row
from engram_lm.vllm.options import RequestOptions
from engram_lm.identity import tokenizer_fingerprint
from engram_lm.vocab import TokenMap

vocab = {"<eos>": 0} | {s: i for i, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
words = Tokenizer(models.BPE(vocab=vocab, merges=[]))
words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
words.add_special_tokens(["<eos>"])
M = words.get_vocab_size()
assert TokenMap.from_tokenizer(words).raw_size == M

rng = np.random.default_rng(0)
documents = [("a", rng.integers(1, M, 3000)), ("b", rng.integers(1, M, 300)), ("c", rng.integers(1, 9, 3000))]
directory = tempfile.mkdtemp() + "/index"
with Index.create(directory, vocab_size=M, tokenizer=tokenizer_fingerprint(words)) as store:
    store.add(documents[:2])
    store.add(documents[2:])
    store.delete("b")
    store.merge()
    assert store.verify().documents == 2
    store.purge()
snapshot = Index.open(directory).snapshot()
context = documents[0][1][100:140]
order, tokens, counts = snapshot.longest(context)
assert (order, tokens.tolist(), counts.tolist()) == (40, [int(documents[0][1][140])], [1])
found = snapshot.distribution(context)
assert abs(float(found.p.sum()) - 1) < 1e-5 and int(found.p.argmax()) == documents[0][1][140]
scores = snapshot.score(context)
assert abs(float(scores.p[-1]) - float(snapshot.distribution(context[:-1]).p[context[-1]])) < 1e-6
assert snapshot.restricted(["c"]).longest(context)[0] < 5

live = Live(Settings(index=directory, lam=0.4), tokenizer=words, n_logits=M, eos_id=0, model=str)
logits = torch.randn(2, M)
mixed = logits.clone()
live.step(mixed, [Row(at=1, last=context, generated=0, part=live.part(RequestOptions()))])
processor = memory_processor(snapshot, FixedLambda(0.4), torch.tensor(context)[None], rules=live.rules)
assert torch.allclose(mixed[1], processor(torch.tensor(context)[None], logits[1:])[0], atol=1e-6)
q = live.rules.prepare(found.p.copy())
assert np.allclose(torch.log_softmax(mixed[1].double(), 0).numpy(), mix_plain(logits[1].numpy(), q, lam=0.4), atol=1e-5)
assert default_gate("smollm2").kind

import vllm
from vllm.v1.sample.logits_processor import LogitsProcessor as One
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as Two
assert issubclass(MemoryLogitsProcessor, One) and issubclass(MemoryLogitsProcessor, Two)
assert not getattr(MemoryLogitsProcessor, "__abstractmethods__", None)
print(json.dumps({"numba": numba.__version__, "numpy": numpy.__version__, "transformers": transformers.__version__,
                  "vllm": vllm.__version__, "modules": loaded}))
"""


def test_the_promised_rooms_work_beside_vllm(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(SOURCE),
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    for name in ("ENGRAM_INDEX", "ENGRAM_GATE", "ENGRAM_LAMBDA"):
        environment.pop(name, None)
    done = subprocess.run(
        [PYTHON, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert {"engram_lm.vllm.plugin", "engram_lm.mixing.processor", "engram_lm.index.store"} <= set(
        found["modules"]
    )
    print({name: version for name, version in found.items() if name != "modules"})
