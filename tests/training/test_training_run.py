"""Training runs: what they leave behind, going on bit for bit after any end, and refusals that touch nothing."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

import engram_lm  # noqa: E402
from engram_lm import cli  # noqa: E402
from engram_lm.errors import ConfigError, DataError, IdentityError  # noqa: E402
from engram_lm.training import run as run_module  # noqa: E402
from engram_lm.training.config import TrainConfig  # noqa: E402
from engram_lm.training.measure import held_out_loss  # noqa: E402
from engram_lm.training.metrics import read_metrics  # noqa: E402
from engram_lm.training.run import train  # noqa: E402
from engram_lm.training.trainer import last_checkpoint  # noqa: E402
from runs_support import TINY, command_line, tiny_config, write_text  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_own_cache(tmp_path_factory):
    """Operators this small are slower on two threads than on one."""
    before, cache = torch.get_num_threads(), os.environ.get("ENGRAM_CACHE")
    torch.set_num_threads(1)
    os.environ["ENGRAM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield cache
    torch.set_num_threads(before)
    if cache is None:
        del os.environ["ENGRAM_CACHE"]
    else:
        os.environ["ENGRAM_CACHE"] = cache


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """(directory, outcome) of one run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train(tiny_config(text), out=out)


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """Drawing takes longer than a run here; the module's one finished run has its picture."""
    if "finished" in request.fixturenames:
        request.getfixturevalue("finished")
    monkeypatch.setattr(run_module, "draw_losses", lambda *_, **__: None)


class Cut(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture
def cut_at(monkeypatch):
    """Makes the next run end at a step, without a word and after the checkpoint of that step if one is due."""

    def cut_at(step):
        original = run_module.RunCallback.on_step_begin

        def on_step_begin(self, args, state, control, **more):
            if state.global_step == step:
                monkeypatch.setattr(run_module.RunCallback, "on_step_begin", original, raising=False)
                raise Cut

        monkeypatch.setattr(run_module.RunCallback, "on_step_begin", on_step_begin, raising=False)

    return cut_at


def same_tensors(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def files_below(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def assert_same_run(one, other):
    """Everything that training decides, bit for bit: parameters, rows, row state, optimizer, schedule, generators."""
    ends = [last_checkpoint(out / "checkpoints") for out in (one, other)]
    assert ends[0].name == ends[1].name
    compared = 0
    for path in ends[0].rglob("*.safetensors"):
        assert same_tensors(load_file(path), load_file(ends[1] / path.relative_to(ends[0]))), path.name
        compared += 1
    assert compared >= 5
    for path in one.glob("*.safetensors"):
        assert same_tensors(load_file(path), load_file(other / path.name)), path.name
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [torch.load(end / name, weights_only=False) for end in ends]
        assert repr(states[0]) == repr(states[1]), name
    optimizers = [torch.load(end / "optimizer.pt")["state"] for end in ends]
    for index, state in optimizers[0].items():
        assert same_tensors(state, optimizers[1][index])
    told = [
        [
            {key: value for key, value in record.items() if key != "tokens_per_second"}
            for record in read_metrics(path)
        ]
        for path in (one / "metrics.jsonl", other / "metrics.jsonl")
    ]
    assert told[0] == told[1]


def test_a_run_leaves_a_memory_and_what_it_measured(finished):
    out, outcome = finished
    assert (outcome.state, outcome.step, outcome.steps) == ("finished", 12, 12)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(out / "metrics.jsonl")
    evaluations = [record for record in records if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 6, 12]
    # new memory is exactly a no-op
    assert evaluations[0]["eval_loss"] == evaluations[0]["eval_loss_off"] == outcome.results["loss_base"]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.2
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 13))
    assert outcome.results["tokens"] == 12 * 128
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == [
        "checkpoint-12",
        "checkpoint-8",
    ]
    stored = TrainConfig.from_json(json.loads((out / "train.json").read_text()))
    assert (stored.mode, stored.layers, stored.save_every) == ("all", (1, 2), 4)


def test_the_memory_loads_and_is_the_one_that_was_measured(finished, text):
    out, outcome = finished
    model = engram_lm.from_pretrained(out)
    assert model.config.use_cache
    prepared = run_module.prepare(tiny_config(text), None, run_module.Quiet())
    loss = held_out_loss(model, prepared.held_out, batch_size=4)
    assert loss == pytest.approx(outcome.results["loss_on"], rel=1e-6)
    off = held_out_loss(model, prepared.held_out, batch_size=4, memory="off")
    assert off == pytest.approx(outcome.results["loss_off"], rel=1e-6)
    assert loss != off


@pytest.mark.parametrize(
    "step", [6, pytest.param(2, marks=pytest.mark.slow), pytest.param(11, marks=pytest.mark.slow)]
)
def test_a_cut_run_goes_on_bit_for_bit(finished, text, tmp_path, cut_at, step):
    cut_at(step)
    with pytest.raises(Cut):
        train(tiny_config(text), out=tmp_path)
    assert not (tmp_path / "memory.json").exists()
    if step > 4:
        # lines of steps after the checkpoint, and half a line: both are measured again
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 9')
    assert train(tiny_config(text), out=tmp_path).state == "finished"
    assert_same_run(finished[0], tmp_path)


@pytest.mark.slow
def test_a_cut_run_of_epochs_with_accumulation_and_documents_goes_on_bit_for_bit(text, tmp_path, cut_at):
    options = {"epochs": 3, "tokens": 1024, "accumulation": 2, "packing": "documents", "schedule": "linear"}
    config = tiny_config(text, **options, rule="row-rmsprop", weight_decay=0.1, save_every=3)
    train(config, out=tmp_path / "whole")
    cut_at(5)
    with pytest.raises(Cut):
        train(config, out=tmp_path / "cut")
    train(config, out=tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_memory_alone_on_a_frozen_base(text, tmp_path, cut_at):
    from engram_lm.bases.base import load_base
    from engram_lm.identity import fingerprint_of

    base = load_base("scratch:tiny", report=lambda line: None)
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    config = tiny_config(text, base=str(tmp_path / "base"))
    whole = train(config, out=tmp_path / "whole")
    assert whole.results["mode"] == "memory"
    assert whole.results["loss_on"] < whole.results["loss_off"] == whole.results["loss_base"]
    # the base is named, not copied
    assert not (tmp_path / "whole" / "base").exists()
    assert not (tmp_path / "whole" / "checkpoints" / "checkpoint-12" / "base").exists()
    assert fingerprint_of(engram_lm.from_pretrained(tmp_path / "whole")) == base.ref.sha256
    cut_at(6)
    with pytest.raises(Cut):
        train(config, out=tmp_path / "cut")
    train(config, out=tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    # another base under the same name
    with torch.no_grad():
        base.model.model.norm.weight.mul_(1.1)
    base.model.save_pretrained(tmp_path / "base")
    with pytest.raises(IdentityError, match=r"belongs to the base .* this model has"):
        engram_lm.from_pretrained(tmp_path / "whole")


def test_out_of_time_leaves_a_memory_and_goes_on(finished, text, tmp_path, monkeypatch):
    outcome = train(tiny_config(text, minutes=1e-6), out=tmp_path)
    assert (outcome.state, outcome.step) == ("out of time", 1)
    assert (tmp_path / "memory.json").exists()
    assert any("go on with: engram-lm train --resume" in line for line in run_module.told(outcome))
    spaced = dataclasses.replace(outcome, directory=Path("a run"))
    assert run_module.told(spaced)[-1] == "go on with: engram-lm train --resume --out 'a run'"
    assert cli.run(["train", "--resume", "--out", str(tmp_path)]) == 0
    ends = [load_file(out / "rows-memory-1.safetensors") for out in (finished[0], tmp_path)]
    assert same_tensors(*ends)


def test_interrupt_saves_a_checkpoint_and_goes_on(finished, text, tmp_path, monkeypatch):
    step_end = run_module.RunCallback.on_step_end

    def interrupted(self, args, state, control, **more):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        step_end(self, args, state, control, **more)

    monkeypatch.setattr(run_module.RunCallback, "on_step_end", interrupted)
    outcome = train(tiny_config(text), out=tmp_path)
    assert (outcome.state, outcome.step) == ("interrupted", 5)
    assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-5"
    monkeypatch.undo()
    train(tiny_config(text), out=tmp_path)
    assert same_tensors(*(load_file(out / "memory.safetensors") for out in (finished[0], tmp_path)))


def test_a_finished_run_is_replaced_only_when_asked(finished, text, tmp_path, capsys):
    out = finished[0]
    before = files_below(out)
    assert cli.run(command_line(text, out)) == 2
    assert "holds a finished run; name another --out, or add --overwrite" in capsys.readouterr().err
    # what cannot run replaces nothing
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert cli.run([*command_line(empty, out), "--overwrite"]) == 2
    assert files_below(out) == before


def test_overwriting_begins_anew_and_leaves_other_files(text, tmp_path):
    train(tiny_config(text, tokens=256, save_every=1), out=tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    outcome = train(tiny_config(text, tokens=384, holdout=0.0), out=tmp_path, earlier="overwrite")
    assert outcome.steps == 3
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-3"


REFUSALS = [
    ({"tokens": 10_000_000}, "10,000,000 tokens were asked for; these documents hold"),
    ({"layers": (9,)}, "layers names block 9"),
    ({"layers": (1, 1)}, "layers names a block twice"),
    ({"mode": "memory"}, "begins with random weights"),
    ({"lora_rank": 4}, "lora_rank has no effect without --mode lora"),
    ({"sequence_length": 5000}, "takes at most 2048 tokens"),
    ({"batch_size": 4000, "tokens": None}, "do not fill one step of 4000"),
    ({"holdout": 0.001}, "too little to measure on"),
    ({"rule": "adam"}, "Unknown row rule 'adam'"),
    ({"profile": "nobody"}, "Unknown profile 'nobody'"),
    ({"learning_rate": -1}, "learning_rate must be greater than 0"),
    (
        {"base": "no/such-model"},
        "'no/such-model' is no directory, and not in the hub's cache on this machine",
    ),
    ({"base": "./nowhere"}, "no such directory"),
    ({"base": "scratch:huge"}, "no recipe is named 'huge'"),
]


@pytest.mark.parametrize(("options", "told"), REFUSALS, ids=[told for _, told in REFUSALS])
def test_refusals_are_one_line_and_leave_nothing(options, told, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.run(command_line(text, out, **options)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("engram-lm: ")
    assert told in last
    assert not out.exists()


def test_text_is_looked_for_before_a_base_is_loaded(text, tmp_path, monkeypatch):
    def loaded(*given, **options):
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("engram_lm.training.setup.load_base", loaded)
    (tmp_path / "empty.txt").write_text("")
    for name in ("nothing.txt", "empty.txt"):
        with pytest.raises(DataError, match=name):
            train(tiny_config(text, data=(str(text), str(tmp_path / name))), out=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b"\n\n \n", "is empty"),
        ("latin.txt", "na\u00efve".encode("latin1"), "is not UTF-8"),
        ("key.jsonl", b'{"body": "x"}\n', "no field 'text'; there are: 'body'"),
        ("broken.jsonl", b'{"text": \n', "broken JSON"),
        ("cut.txt.xz", b"\xfd7zXZ\x00\x00", "damaged or cut short"),
        ("table.csv", b"a,b", "text is read from .txt and .jsonl"),
    ],
)
def test_text_that_cannot_be_used_is_one_line(name, data, told, tmp_path, capsys):
    (tmp_path / name).write_bytes(data)
    out = tmp_path / "out"
    assert cli.run(command_line(tmp_path / name, out)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("engram-lm: ")
    assert told in last
    assert not out.exists()


def test_a_directory_of_something_else_is_left_alone(text, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    for more in ([], ["--overwrite"]):
        assert cli.run([*command_line(text, tmp_path), *more]) == 2
        assert "is not empty and holds no run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_going_on_wants_the_same_run(text, tmp_path, cut_at, capsys):
    cut_at(5)
    with pytest.raises(Cut):
        train(tiny_config(text), out=tmp_path / "run")
    before = files_below(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"was begun with learning_rate 0.003; this command says 0.01"):
        train(tiny_config(text, learning_rate=0.01), out=tmp_path / "run")
    other = write_text(tmp_path / "other.txt", paragraphs=121)
    with pytest.raises((DataError, IdentityError), match="was begun on"):
        train(tiny_config(other), out=tmp_path / "run")
    # a checkpoint of another base
    manifest = tmp_path / "run" / "checkpoints" / "checkpoint-4" / "memory.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"base": facts["base"] | {"sha256": "0" * 64}}))
    with pytest.raises(IdentityError, match="belongs to the base 'scratch:tiny' with weights 000000000000"):
        train(tiny_config(text), out=tmp_path / "run")
    manifest.write_text(json.dumps(facts))
    # a checkpoint of other addresses
    entry = facts["memories"][0]["tables"][0]
    changed = entry["identity_facts"] | {"seed": 99}
    facts["memories"][0]["tables"][0] = entry | {"identity_facts": changed}
    manifest.write_text(json.dumps(facts))
    with pytest.raises(IdentityError):
        train(tiny_config(text), out=tmp_path / "run")
    assert set(files_below(tmp_path / "run")) == set(before)


def test_resume_needs_a_run(tmp_path, capsys):
    assert cli.run(["train", "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "holds no run to resume" in capsys.readouterr().err


def test_options_from_a_file_come_before_defaults_and_after_the_command_line(text, tmp_path, capsys):
    options = tmp_path / "options.json"
    options.write_text(json.dumps(TINY | {"data": [str(text)], "tokens": 256}))
    assert (
        cli.run(["train", "--config", str(options), "--tokens", "128", "--out", str(tmp_path / "run")]) == 0
    )
    stored = json.loads((tmp_path / "run" / "train.json").read_text())
    assert (stored["tokens"], stored["learning_rate"]) == (128, 3e-3)
    for broken, told in (
        (
            '{"base": "smollm2", "data": ["a.txt"], "learning-rate": 1}',
            "Unknown training option 'learning-rate'",
        ),
        ("[]", "wanted an object of training options"),
        ("{", "is no JSON"),
        ('{"base": "smollm2", "data": ["a.txt"], "tokens": "many"}', "tokens is a whole number; got 'many'"),
        ('{"base": "smollm2"}', "A run needs text"),
        ('{"data": ["a.txt"]}', "A run needs a base"),
    ):
        options.write_text(broken)
        assert cli.run(["train", "--config", str(options), "--out", str(tmp_path / "other")]) == 2
        captured = capsys.readouterr().err
        assert told in captured.splitlines()[-1]
    assert not (tmp_path / "other").exists()


def test_config_goes_to_json_and_back(text):
    config = tiny_config(text, mode="all", minutes=3.0)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_every_option_is_on_the_command_line(capsys):
    assert cli.run(["train", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in told
        if field.metadata:
            assert field.metadata["help"].split(" (")[0].split()[0] in told
            assert "…" not in field.metadata["help"]


def test_only_what_was_given_is_handed_on(monkeypatch):
    from engram_lm.training import command

    seen = []
    monkeypatch.setattr(command, "train_command", lambda given, **others: seen.append((given, others)) or 0)
    line = [
        "train",
        "b",
        "--out",
        "d",
        "--data",
        "a",
        "c",
        "--tokens",
        "5",
        "--layers",
        "1,2",
        "--clip",
        "0",
        "--resume",
    ]
    assert cli.run(line) == 0
    ((given, others),) = seen
    assert given == {"base": "b", "data": ["a", "c"], "tokens": 5, "layers": "1,2", "clip": 0.0}
    assert others == {"out": Path("d"), "config_file": None, "resume": True, "overwrite": False}


# ---- processes that are really killed --------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from engram_lm.training import run, trainer
where, at = sys.argv[1], int(sys.argv[2])
def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
if where == "step":
    original = run.RunCallback.on_step_end
    def on_step_end(self, args, state, control, **more):
        original(self, args, state, control, **more)
        if state.global_step == at: kill()
    run.RunCallback.on_step_end = on_step_end
elif where == "checkpoint":
    original = trainer.mark_whole
    trainer.mark_whole = lambda directory, step: kill() if step == at else original(directory, step=step)
else:
    run.save_memory = kill
from engram_lm import cli
sys.exit(cli.run(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("where", "at"), [("step", 3), ("step", 9), ("checkpoint", 8), ("end", 0)])
def test_a_killed_process_loses_the_steps_since_the_last_checkpoint_at_most(
    finished, text, tmp_path, where, at
):
    out = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(at), *command_line(text, out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    begun_again = []
    step_begin = run_module.RunCallback.on_train_begin

    def on_train_begin(self, args, state, control, **more):
        begun_again.append(state.global_step)
        step_begin(self, args, state, control, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.RunCallback, "on_train_begin", on_train_begin)
        train(tiny_config(text), out=out)
    assert begun_again == [{("step", 3): 0, ("step", 9): 8, ("checkpoint", 8): 4, ("end", 0): 12}[where, at]]
    assert_same_run(finished[0], out)


@pytest.mark.slow
def test_ctrl_c_on_the_command_line(text, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "engram_lm.cli",
            *command_line(text, out, tokens=None, epochs=400, log_every=1),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(read_metrics(out / "metrics.jsonl")) < 5:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"go on with: engram-lm train --resume --out {shlex.quote(str(out))}" in printed
    assert last_checkpoint(out / "checkpoints") is not None


@pytest.mark.slow
@pytest.mark.network
def test_lora_and_memory_on_smollm2(one_thread_and_own_cache, text, tmp_path, cut_at, monkeypatch):
    if one_thread_and_own_cache is None:
        monkeypatch.delenv("ENGRAM_CACHE")
    else:
        monkeypatch.setenv("ENGRAM_CACHE", one_thread_and_own_cache)
    small = {
        "base": "smollm2",
        "layers": (1, 15),
        "mode": "lora",
        "lora_rank": 2,
        "tokens": 512,
        "save_every": 2,
    }
    whole = train(tiny_config(text, **small), out=tmp_path / "whole")
    assert whole.results["loss_on"] < whole.results["loss_base"]
    cut_at(3)
    with pytest.raises(Cut):
        train(tiny_config(text, **small), out=tmp_path / "cut")
    train(tiny_config(text, **small), out=tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert type(engram_lm.from_pretrained(tmp_path / "whole")).__name__ == "PeftModelForCausalLM"


@pytest.mark.slow
def test_lora_and_memory(text, tmp_path, cut_at):
    from engram_lm.bases.base import load_base

    base = load_base("scratch:tiny", report=lambda line: None)
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    config = tiny_config(text, base=str(tmp_path / "base"), mode="lora", lora_rank=2)
    whole = train(config, out=tmp_path / "whole")
    assert whole.results["loss_on"] < whole.results["loss_off"] < whole.results["loss_base"]
    cut_at(6)
    with pytest.raises(Cut):
        train(config, out=tmp_path / "cut")
    train(config, out=tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    model = engram_lm.from_pretrained(tmp_path / "whole")
    assert model.peft_config["default"].r == 2
    assert not any("lora" in name for name, _ in model.named_parameters() if ".engram." in name)
