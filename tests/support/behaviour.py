"""What commands, models and the server say on small stand-ins, as one JSON record: two trees of the code are compared by it.

    PYTHONPATH=TREE/src:TREE/tests/support python tests/support/behaviour.py RECORD.json      # of any tree
    python tests/support/behaviour.py OLD.json NEW.json                                        # what differs, bit for bit

It stands on command lines, HTTP and the few Python names that stay, so that it runs on older trees too (for those before
tests stood in rooms, PYTHONPATH ends in TREE/tests). `tests/test_behaviour.py` holds the code to tests/golden/behaviour.json,
floats to 1e-5, as bits differ between processors. What times, dates and versions say is left out (`_MASKED`).
"""

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# of a machine, a moment or a version, not of what was asked
_MASKED = {
    "seconds", "ms", "first_token_ms", "micro_seconds", "date", "load_average", "versions", "cpu", "cores",
    "threads", "system", "python", "commit", "dirty", "accelerator", "save_id", "run", "version", "memory_seconds",
    "model_seconds", "circumstances", "environment", "tokens_per_second", "stored", "merge_error", "started_ms",
    "base_sha256", "command", "model_sha256", "memory_sha256", "fingerprint",
}  # fmt: skip
# an index notes when a document was added, in as many digits as that takes
_OF_AN_INDEX = {"bytes", "bytes_per_token", "bytes_read"}
_PROGRESS = re.compile(r"^step \d+/\d+ .*\n", re.MULTILINE)
_TIMES = re.compile(r"\d[\d.,]*\s?(?:ms|µs|s|MB/s|minutes?|seconds?)\b")

HANDBOOK = {
    "leave.md": "Annual leave is 31 days for everyone. Whoever wants to take it writes to Odalys Brandt.",
    "dog.md": "The office dog is called Orlando. He sleeps under the stairs and wants his bone at seven.",
    "travel.md": "A night in a hotel may cost 118 crowns, breakfast included. The ferry leaves at 6:25.",
}
WORDS = (
    "the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "after", "the", "cat", "while", "a", "bird",
    "sang", "in", "the", "old", "tree", "by", "the", "river",
)  # fmt: skip
REFUSED = """
generate absent Hello
generate model Hello
generate memory Hello --lam 0.5
generate memory Hello --max-new-tokens 0
generate memory Hello --seed 3
generate memory Hello --heat gate --full 2
generate memory Hello --tier cached
generate memory Hello --block 7
generate model Hello --index notes --lam 2
generate model Hello --index notes --lam 0.5 --gate g.json
generate model Hello --index notes --lam 0.5 --documents absent.md
generate model Hello --index notes --lam 0.5 --documents all --top-k 3
generate model Hello --index notes --lam 0.5 --strict
generate model Hello --index notes --lam 0.5 --most-verbatim 0
generate model Hello --index notes --lam 0.5 --count tokens
generate model Hello --index notes --lam 0.5 --tier disk
generate model Hello --index absent --lam 0.5
generate memory Hello --chat
index create notes --model model
index add notes absent.txt
index add notes handbook
index delete notes absent.md
index search notes
index token acme --key-file absent
train model --out run
train absent --data handbook/dog.md --out run
train model --data absent.txt --out run
train model --data handbook/dog.md --out run --tokens 0
train model --data handbook/dog.md --out run --layers one
train model --data handbook/dog.md --out run --schedule square
train model --data handbook/dog.md --out run --warmup 1
train model --data handbook/dog.md --out run --lora-rank 4
train scratch:tiny --data handbook/dog.md --out run --mode memory
train model --data handbook/dog.md --out run --resume
train model --data handbook/dog.md --out run --control nothing
trace memory ""
table info absent
table stats memory --layer 9
doctor model
addresses --profile paper --layer 1 --ids 1,x
eval memory --out e
eval memory --out e --gates
eval memory --out e --text absent.txt
gate report absent.json
adapt model handbook/dog.md --out a
ablate model --out b --data handbook/dog.md --arms nothing
nothing
""".strip().splitlines()


def record(directory: Path) -> dict[str, Any]:
    """Everything, in an empty directory. Takes half a minute."""
    with _inside(directory):
        model, ids = _lay_out()
        found = {"logits": _logits(model, ids), "mixture": _mixture(model, ids)}
        for name, line in COMMANDS.items():
            found[f"command: {name}"] = _run(line)
        for line in REFUSED:
            found[f"refused: {line}"] = _run(line)
        found["files"] = _files()
        found |= {f"server: {name}": answer for name, answer in _server().items()}
    return _masked(found, str(directory.resolve()))


COMMANDS = {
    "create": "index create notes --model model --json",
    "add": "index add notes handbook --json",
    "add one": "index add notes handbook/dog.md --id dog --licence CC0 --json",
    "search": "index search notes 'office dog' --json",
    "search in words": "index search notes 'annual leave'",
    "explain": "index explain notes 'The office dog is called' --json",
    "verbatim": "index verbatim notes handbook/leave.md --json",
    "generate from the index": "generate model 'The office dog' --index notes --lam 0.9 --max-new-tokens 20 --color never",
    "generate with drafts": "generate model 'The office dog' --index notes --lam 0.9 --max-new-tokens 20 --drafts",
    "generate red": "generate model 'The office dog' --index notes --lam 0.9 --max-new-tokens 9 --color always",
    "generate sampled": "generate model 'The ferry' --index notes --lam 0.5 --temperature 0.8 --seed 3 --max-new-tokens 20",
    "generate with a session": "generate model 'cats and ca' --index notes --lam 0.9 --session --max-new-tokens 6",
    "generate capped": "generate model 'Annual leave' --index notes --lam 0.9 --most-verbatim 5 --max-new-tokens 20",
    "generate from one": "generate model 'The office' --index notes --lam 0.9 --documents dog --max-new-tokens 9",
    "generate an answer": "generate model 'What is the office dog called?' --index notes --max-new-tokens 9",
    "generate with tables": "generate memory 'the cat sat' --max-new-tokens 12 --color always",
    "generate without them": "generate memory 'the cat sat' --memory off --max-new-tokens 12",
    "generate with gates": "generate memory 'the cat sat' --heat gate --block 1 --branch 0 --max-new-tokens 5 --color always",
    "generate from disk": "generate memory 'the cat sat' --tier disk --max-new-tokens 12",
    "trace": "trace memory 'the cat' --json",
    "trace as a table": "trace memory 'the cat' --limit 3",
    "addresses paper": "addresses --profile paper --layer 1 --canonical --ids 0,5,17,42 --vocab-size 258 --fill-id 0 --json",
    "addresses deepseek": "addresses --profile deepseek-v4.1 --layer 1 --canonical --ids 0,5,17,-1,42 --json",
    "addresses qwen": "addresses --profile qwen-ple --layer 1 --ids 0,5,17,42 --eos-ids 1 --json",
    "table info": "table info memory --json",
    "table verify": "table verify memory --json",
    "table stats": "table stats memory --json",
    "table rows": "table rows memory 1,2 --layer 1",
    "table convert": "table convert memory packed --json",
    "table packed": "table info packed --json",
    "table diff": "table diff memory packed --json",
    "simulate": "table simulate --tokens texts.jsonl --tokenizer model --profile paper --layers 1 --rows-per-head 211 "
    "--fill-id 0 --budget 10KB,100KB --json",
    "gate fit": "gate fit model --index big --general texts.jsonl --out gate.json --texts 4",
    "gate report": "gate report gate.json --json",
    "generate with a gate": "generate model 'the cat' --index big --gate gate.json --max-new-tokens 12",
    "train": "train model --data texts.jsonl --out run --tokens 2048 --sequence-length 64 --batch-size 4 --rows-per-head 211 "
    "--head-width 8 --heads 2 --holdout 0.25 --seed 1 --device cpu",
    "generate from the run": "generate run 'the cat' --max-new-tokens 9",
    "eval": "eval run --text texts.jsonl --facts facts.jsonl --gates --tokens 600 --window 64 --out report --json",
    "adapt": "adapt model many --out adapted --windows 4 --lam 0.5 --json",
    "update": "index update notes handbook/leave.md --json",
    "delete": "index delete notes dog --json",
    "sync": "index sync notes handbook --json",
    "merge": "index merge notes --json",
    "verify": "index verify notes --json",
    "purge": "index purge notes --json",
    "stats": "index stats notes --json",
}


def _lay_out() -> tuple[Any, Any]:
    """Model, memory, documents and texts in the current directory; (a model with loud memory, ids)."""
    import random

    import torch

    import engram_lm
    from engram_lm.library import Library, Text
    from models import build, give_memory, make_loud, saved_doll

    torch.manual_seed(0)
    _, doll, words = saved_doll("model")
    config = engram_lm.MemoryConfig(layers=(0, 1), rows_per_head=211, head_width=8, heads=2)
    engram_lm.attach(doll, words, config)
    make_loud(doll)
    engram_lm.save_memory(doll, "memory", base_files="always")
    Path("handbook").mkdir()
    for name, text in HANDBOOK.items():
        Path("handbook", name).write_text(text)
    draw = random.Random(1)
    texts = [" ".join(draw.choice(WORDS) for _ in range(120)) for _ in range(24)]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    facts = [
        {"relation": "where", "prompt": "the cat sat on", "answer": f"the {word}"}
        for word in ("mat", "tree", "river")
    ]
    Path("facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    Path("many").mkdir()
    for n in range(6):
        Path("many", f"{n}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(150)))
    with Library.create("big", tokenizer=words) as library:
        library.add([Text(id=str(n), text=text) for n, text in enumerate(texts[:6])])
    model = give_memory(build("llama", torch.float64), "several")
    return model, torch.tensor([[70, 71, 72, 70, 71, 72, 99, 70, 71, 33, 34, 35, 70, 71]])


def _logits(model: Any, ids: Any) -> Any:
    """A full pass, cached decoding, the memory off and on another architecture."""
    import torch

    from models import build, give_memory

    found = {}
    for name, one in (("llama", model), ("gemma3", give_memory(build("gemma3", torch.float64), "paper"))):
        with torch.no_grad():
            found[name] = one(ids).logits[0, -3:, :40].tolist()
            found[f"{name}, memory off"] = one(ids, memory="off").logits[0, -1, :40].tolist()
            first = one(ids[:, :9], use_cache=True)
            found[f"{name}, cached"] = (
                one(ids[:, 9:], past_key_values=first.past_key_values).logits[0, -1, :40].tolist()
            )
            found[f"{name}, generated"] = one.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    return found


def _mixture(model: Any, ids: Any) -> Any:
    """The shipped gate's mixture in a model's distribution."""
    import torch

    from engram_lm.library import Library, Text
    from engram_lm.mixing import FixedLambda, memory_processor
    from models import tokenizer

    words = tokenizer()
    with Library.create("few", tokenizer=words) as library:
        library.add([Text(id=name, text=text) for name, text in HANDBOOK.items()])
        snapshot = library.store.snapshot()
    prompt = torch.tensor([words("The office dog is").input_ids])
    processor = memory_processor(snapshot, FixedLambda(0.5), prompt, tokenizer=words, model=model, session=64)
    out = model.generate(prompt, max_new_tokens=10, do_sample=False, logits_processor=[processor])
    return [None if step is None else step.as_dict() for step in processor.steps(out)[0]]


def _server() -> dict[str, Any]:
    """Each endpoint once."""
    from serve_support import served

    found = {}
    with served(Path("served")) as site:
        for name, path, body in (
            ("about", "/api/about", None),
            ("documents", "/api/documents", None),
            ("openapi", "/api/openapi.json", None),
            ("trace", "/api/trace", {"text": "The office dog"}),
            ("losses", "/api/losses", {"text": "The office dog", "tables": False}),
            ("next", "/api/next", {"prompt": "The office dog is", "candidates": ["called", "cold"]}),
            ("search", "/api/search", {"text": "office"}),
            ("explain", "/api/explain", {"text": "The office"}),
            ("wrong", "/api/next", {"prompt": ""}),
        ):
            answer = site.get(path) if body is None else site.post(path, body)
            said = answer.json() if name == "openapi" else _without(answer.json(), _OF_AN_INDEX)
            found[name] = {"status": answer.status_code, "json": said}
        for arm in ("alone", "memory", "retrieval"):
            found[f"generate, {arm}"] = site.events(prompt="The office dog", arm=arm, max_tokens=9)
    return found


def _run(line: str) -> dict[str, Any]:
    """Exit code, standard output (as JSON where it is) and standard error of a command line."""
    import shlex

    from engram_lm import cli

    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = cli.run(shlex.split(line))
    try:
        said: Any = [json.loads(part) for part in out.getvalue().splitlines()]
    except ValueError:
        said = out.getvalue()
    if line.startswith("index "):
        said = _without(said, _OF_AN_INDEX)
    return {"code": code, "out": said, "errors": errors.getvalue()}


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(each, keys) for key, each in value.items() if key not in keys}
    return [_without(each, keys) for each in value] if isinstance(value, list) else value


def _files() -> dict[str, str]:
    """sha256 of files whose bytes are the same everywhere."""
    wanted = [
        "memory/tokens-*.bin",
        "memory/rows-*",
        "notes/tokenizer.json",
        "notes/*.mask",
    ]
    found = {}
    for pattern in wanted:
        for path in sorted(Path().glob(pattern)):
            data = path.read_bytes()
            if path.suffix == ".safetensors":  # what the header says of the save is random
                data = data[8 + int.from_bytes(data[:8], "little") :]
            found[str(path)] = hashlib.sha256(data).hexdigest()
    return found


def _masked(value: Any, directory: str) -> Any:
    if isinstance(value, dict):
        # a document's "added" is a time; how many were added is a whole number
        left_out = {
            key for key in value if key in _MASKED or (key == "added" and isinstance(value[key], float))
        }
        return {key: "…" if key in left_out else _masked(each, directory) for key, each in value.items()}
    if isinstance(value, list):
        return [_masked(each, directory) for each in value]
    if isinstance(value, str):
        return _TIMES.sub("…", _PROGRESS.sub("", value).replace(directory, "DIRECTORY"))
    return value


def differences(old: Any, new: Any, *, close: float = 0.0, where: str = "") -> Iterator[str]:
    """What differs, a line each. close: floats may differ by this much, of the larger one."""
    if (isinstance(old, float) and isinstance(new, int | float)) or (
        isinstance(new, float) and isinstance(old, int | float)
    ):
        if old != new and not abs(old - new) <= close * max(abs(old), abs(new), 1e-2):
            yield f"{where}: {old!r} → {new!r}"
    elif type(old) is not type(new):
        yield f"{where}: {old!r} → {new!r}"
    elif isinstance(old, dict):
        for key in sorted({*old, *new}):
            if key not in old or key not in new:
                yield f"{where}.{key}: {'new' if key not in old else 'gone'}"
            else:
                yield from differences(old[key], new[key], close=close, where=f"{where}.{key}")
    elif isinstance(old, list):
        if len(old) != len(new):
            yield f"{where}: {len(old)} → {len(new)} entries"
        for n, (one, other) in enumerate(zip(old, new, strict=False)):
            yield from differences(one, other, close=close, where=f"{where}[{n}]")
    elif isinstance(old, str) and close and _numbers(old) and _without_numbers(old) == _without_numbers(new):
        if any(
            abs(a - b) > 1e-2 * max(abs(a), abs(b)) + 0.011
            for a, b in zip(_numbers(old), _numbers(new), strict=True)
        ):
            yield f"{where}: {old!r} → {new!r}"
    elif old != new:
        yield f"{where}: {old!r} → {new!r}"


_NUMBER = re.compile(r"-?\d+\.\d+")


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(text)]


def _without_numbers(text: str) -> str:
    return _NUMBER.sub("#", text)


@contextlib.contextmanager
def _inside(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        one, other = (json.loads(Path(path).read_text(encoding="utf8")) for path in sys.argv[1:])
        told = list(differences(one, other))
        print("\n".join(told) or "no difference")
        sys.exit(1 if told else 0)
    # as tests/conftest.py has it
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    import torch

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ENGRAM_CACHE"] = f"{scratch}/cache"
        found = record(Path(scratch, "here"))
    Path(sys.argv[1]).write_text(
        json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf8"
    )
    print(f"{len(found)} cases")
