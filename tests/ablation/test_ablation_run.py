"""engram-lm ablate: one text and order for every arm, going on after a stop, one result an arm, table and picture."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from engram_lm import cli  # noqa: E402
from engram_lm.ablation import run as run_module  # noqa: E402
from engram_lm.ablation.plan import RETROFIT_ARMS, SCRATCH_ARMS, Plan  # noqa: E402
from engram_lm.ablation.report import PICTURE, REPORT, change, draw, perplexity  # noqa: E402
from engram_lm.ablation.run import ablate, read_results  # noqa: E402
from engram_lm.ablation.sizes import sizes_of  # noqa: E402
from engram_lm.corpus.blocks import Blocks  # noqa: E402
from engram_lm.errors import CheckpointError, ConfigError, DataError  # noqa: E402
from engram_lm.training import run as train_module  # noqa: E402
from engram_lm.training.trainer import MemoryTrainer  # noqa: E402
from runs_support import TINY, tiny_config, write_text  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    before = os.environ.get("ENGRAM_CACHE")
    os.environ["ENGRAM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["ENGRAM_CACHE"]
    else:
        os.environ["ENGRAM_CACHE"] = before


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def a_base(text, tmp_path_factory):
    """A directory with a pretrained base, as far as this command can tell."""
    from engram_lm.bases.base import load_base

    path = tmp_path_factory.mktemp("base")
    model, tokenizer, _ = load_base("scratch:tiny", text_files=[text], report=lambda line: None)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def no_loss_picture(monkeypatch):
    monkeypatch.setattr(train_module, "draw_losses", lambda *_, **__: None)


def a_plan(text, arms, **options):
    own = {name: options.pop(name) for name in ("seeds", "train_from", "rates", "texts") if name in options}
    return Plan(shared=tiny_config(text, **{"tokens": 512} | options), arms=arms, **own)


def without_time(path):
    data = json.loads(path.read_text())
    kept = ("losses", "steps", "tokens", "last_training_loss", "trained_parameters", "config", "data")
    return {name: data.get(name) for name in kept}


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """An ablation of a scratch base that nothing interrupted, and which blocks each arm was trained on."""
    out, seen, order = tmp_path_factory.mktemp("ablation") / "whole", [], {}
    patch = pytest.MonkeyPatch()
    take = Blocks.__getitem__

    def noted(self, number):
        # of the training side alone: what is held out has no limit
        if self.max_tokens is not None:
            seen.append(number)
        return take(self, number)

    def trained(config, directory, progress):
        seen.clear()
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(Blocks, "__getitem__", noted)
            state = own(config, directory, progress)
        order[directory.name] = tuple(seen)
        return state

    own = run_module._train
    patch.setattr(run_module, "_train", trained)
    patch.setattr(train_module, "draw_losses", lambda *_, **__: None)
    try:
        plan = a_plan(text, ("memory", "one-row", "none"), texts={"again": str(text)})
        assert ablate(plan, out=out, command="as typed") == "finished"
        # arms and seeds may come later
        plan = a_plan(text, ("memory",), seeds=(0, 1), texts={"again": str(text)})
        assert ablate(plan, out=out, command="as typed") == "finished"
    finally:
        patch.undo()
    return out, order


def test_every_arm_is_trained_on_the_same_blocks_in_the_same_order(whole):
    _, order = whole
    assert set(order) == {"memory-0", "one-row-0", "none-0", "memory-1"}
    assert order["memory-0"] == order["one-row-0"] == order["none-0"]
    assert len(order["memory-0"]) == 512 // 32
    assert order["memory-0"] != order["memory-1"]


def test_a_result_says_where_it_comes_from(whole):
    out, _ = whole
    result = json.loads((out / "results" / "one-row-0.json").read_text())
    assert (result["arm"], result["seed"], result["config"]["control"]) == ("one-row", 0, "one-row")
    assert set(result["losses"]) == {"held out", "again"}
    assert result["circumstances"]["cores"] >= 1
    assert len(result["data"][0]["sha256"]) == 64
    assert result["command"] == "as typed"
    assert result["texts"]["again"][0]["name"] == "text.txt"
    assert not (out / "runs" / "one-row-0" / "checkpoints").exists()


def test_table_and_picture_come_from_the_results_alone(whole):
    out, _ = whole
    said = draw(out)
    assert (out / REPORT).read_text() == said + "\n"
    assert (out / PICTURE).read_bytes()[:4] == b"\x89PNG"
    lines = said.splitlines()
    assert [line.split(" | ")[0].lstrip("| ") for line in lines[2:]] == [
        "memory",
        "one row for all n-grams",
        "no memory",
    ]
    assert "0, 1" in lines[2]
    assert "seeds" in lines[2].split(" | ")[6]


def test_changes_are_paired_by_block():
    def rows(*sums):
        return [{"losses": {"t": {"sums": list(sums), "counts": [10] * len(sums)}}}]

    one, other = rows(10, 40, 20, 30, 15, 25), rows(11, 41, 21, 31, 16, 26)
    value, ends = change(other, one, "t")
    # each block is a nat worse, however different the blocks are
    assert value == pytest.approx(math.e**0.1 - 1)
    assert ends == pytest.approx([value, value])
    assert perplexity(one, "t")[1][0] < perplexity(one, "t")[0] < perplexity(one, "t")[1][1]


def test_a_finished_ablation_trains_nothing(whole, text, monkeypatch):
    out, _ = whole
    before = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    plan = a_plan(text, ("memory", "one-row", "none"), texts={"again": str(text)})
    monkeypatch.setattr(run_module, "_train", lambda *_: pytest.fail("trained again"))
    assert ablate(plan, out=out) == "finished"
    assert before == {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}


def test_other_options_are_refused(whole, text):
    out, _ = whole
    plan = a_plan(text, ("memory",), learning_rate=1e-4, texts={"again": str(text)})
    with pytest.raises(ConfigError, match=r"begun with learning_rate 0\.003.*0\.0001"):
        ablate(plan, out=out)


def test_a_text_that_changed_meanwhile_is_refused(text, tmp_path, monkeypatch):
    own = tmp_path / "own.txt"
    own.write_text(text.read_text())
    plan = a_plan(own, ("none",))
    monkeypatch.setattr(run_module, "_train", lambda *_: "interrupted")
    assert ablate(plan, out=tmp_path / "out") == "interrupted"
    assert ablate(plan, out=tmp_path / "out") == "interrupted"
    own.write_text(text.read_text() + "one more line\n")
    with pytest.raises(ConfigError, match=r"own.txt is not what it was when .* was begun"):
        ablate(plan, out=tmp_path / "out")


def test_retrofit_arms_train_what_they_say(text, a_base, tmp_path):
    arms = ("memory", "none", "continued", "bias", "lora")
    plan = a_plan(text, arms, base=str(a_base), train_from=2, tokens=256)
    assert ablate(plan, out=tmp_path / "out") == "finished"
    found = {result["arm"]: result for result in read_results(tmp_path / "out")}
    sizes = sizes_of(plan.shared, train_from=2)
    assert not {"steps", "config"} & set(found["none"])
    assert found["bias"]["trained_parameters"] == 2 * sizes.hidden_size
    # handles of the two tables are parameters too
    assert found["memory"]["trained_parameters"] == sizes.memory_weights + 2
    assert found["lora"]["trained_parameters"] == sizes.lora_rank * sizes.lora_of_rank_1
    assert found["lora"]["trained_parameters"] == pytest.approx(sizes.memory_weights, rel=0.5)
    assert found["continued"]["config"]["learning_rate"] == pytest.approx(3e-4)
    from safetensors.torch import load_file

    before = load_file(a_base / "model.safetensors")
    after = load_file(tmp_path / "out" / "runs" / "continued-0" / "base" / "model.safetensors")
    changed = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"2", "3"}


def test_scratch_sizes_and_arms(text):
    shared = tiny_config(text)
    sizes = sizes_of(shared)
    plan = Plan(shared=shared, arms=SCRATCH_ARMS)
    wide = plan.config("wide-ffn", 0, sizes)
    grown = (wide.ffn_width - 384) * 3 * sizes.hidden_size * sizes.blocks
    assert grown == pytest.approx(sizes.memory_weights + sizes.rows, rel=0.02)
    assert plan.config("fast-embedding", 0, sizes).embedding_rate == 5
    unigram = plan.config("unigram", 0, sizes)
    assert (unigram.orders, unigram.heads) == ((1,), 4)
    assert {plan.config(arm, 3, sizes).seed for arm in SCRATCH_ARMS} == {3}


def test_fast_embedding_has_its_own_rate(text, tmp_path, monkeypatch):
    groups = []
    own = MemoryTrainer.create_optimizer

    def noted(self, model=None):
        optimizer = own(self, model)
        groups.extend(
            (g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in optimizer.param_groups
        )
        return optimizer

    monkeypatch.setattr(MemoryTrainer, "create_optimizer", noted)
    plan = a_plan(text, ("fast-embedding",), weight_decay=0.1, tokens=128)
    assert ablate(plan, out=tmp_path / "out") == "finished"
    fast = [group for group in groups if group[0] == pytest.approx(5 * 3e-3)]
    assert len(fast) == 1
    assert fast[0][1] == 0
    assert fast[0][2] > 10_000


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"arms": ("memory", "lora")}, ConfigError, "trained from scratch has the arms"),
        ({"arms": ("memory", "memory")}, ConfigError, "each arm once"),
        ({"arms": ("memory",), "seeds": ()}, ConfigError, "each seed once; got none"),
        ({"arms": ("memory",), "mode": "all"}, ConfigError, "mode is what arms differ in"),
        ({"arms": ("memory",), "holdout": 0.0}, ConfigError, "Nothing would be measured"),
        ({"arms": ("memory",), "train_from": 2}, ConfigError, "no effect on a scratch base"),
        ({"arms": ("memory",), "texts": {"held out": "x.txt"}}, ConfigError, "name the text otherwise"),
        ({"arms": ("memory",), "rates": {"lora": 1e-3}}, ConfigError, "got 'lora'"),
    ],
)
def test_plans_that_cannot_be(options, error, words, text):
    options = dict(options)
    with pytest.raises(error, match=words):
        a_plan(text, options.pop("arms"), **options)


def test_a_missing_text_is_said_before_anything_is_loaded(text, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "sizes_of", lambda *_, **__: pytest.fail("loaded"))
    plan = a_plan(text, ("memory",), texts={"general": str(tmp_path / "nosuch.txt")})
    with pytest.raises(DataError, match=r"nosuch\.txt"):
        ablate(plan, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(CheckpointError, match="holds no ablation"):
        ablate(a_plan(text, ("memory",)), out=tmp_path)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--draw", "--out", "{nothing}"], "holds no finished arm"),
        (["--draw", "--out", "x", "--tokens", "5"], "--tokens has no effect"),
        (["--draw", "--out", "x", "--arms", "memory"], "--arms has no effect"),
        (["scratch:tiny", "--data", "x.txt", "--out", "x", "--rates", "lora"], "ARM=RATE"),
        (["scratch:tiny", "--data", "x.txt", "--out", "x", "--seeds", "a"], "whole numbers"),
        (["scratch:tiny", "--out", "x"], "needs text"),
        (["--data", "x.txt", "--out", "x"], "needs a base"),
    ],
)
def test_one_clear_sentence(tokens, words, tmp_path, capsys):
    assert cli.run(["ablate", *(token.format(nothing=tmp_path) for token in tokens)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_arms_are_documented():
    from engram_lm.ablation.report import NAMES

    assert set(NAMES) == {*SCRATCH_ARMS, *RETROFIT_ARMS}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base": "smollm2", "control": "off"}, "nothing trains"),
        ({"base": "smollm2", "train_from": 3}, "train_from has no effect in mode memory"),
        ({"base": "smollm2", "ffn_width": 64}, "ffn_width belongs to scratch bases"),
        ({"base": "smollm2", "embedding_rate": 5.0}, "embedding_rate has no effect"),
        ({"control": "half"}, "control is one-row"),
    ],
)
def test_runs_that_cannot_be(options, words, text):
    with pytest.raises(ConfigError, match=words):
        tiny_config(text, **options)


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_numbers(text, tmp_path):
    chosen = {k: v for k, v in TINY.items() if k not in ("base", "eval_every", "save_every")}
    options = ["--config", str(tmp_path / "shared.json")]
    shared = {
        "base": "scratch:tiny",
        "data": [str(text)],
        **chosen,
        "tokens": 2048 - 512,
        "epochs": 3,
        "save_every": 3,
    }
    (tmp_path / "shared.json").write_text(json.dumps(shared))
    arms = ["--arms", "memory,shuffled,frozen-random"]

    def command(out):
        return [sys.executable, "-m", "engram_lm.cli", "ablate", *options, *arms, "--out", str(out)]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, env=environment, timeout=280)
    killed = tmp_path / "killed"
    for where, number in (("runs/memory-0", signal.SIGKILL), ("runs/shuffled-0", signal.SIGINT)):
        running = subprocess.Popen(
            command(killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        checkpoints = killed / where / "checkpoints"
        while running.poll() is None and not list(checkpoints.glob("checkpoint-*/whole.json")):
            time.sleep(0.02)
        assert running.poll() is None, running.stderr.read().decode()
        running.send_signal(number)
        running.communicate(timeout=120)
    subprocess.run(command(killed), check=True, capture_output=True, env=environment, timeout=280)
    for arm in ("memory", "shuffled", "frozen-random"):
        name = f"results/{arm}-0.json"
        assert without_time(killed / name) == without_time(tmp_path / "whole" / name), arm
    assert (killed / REPORT).read_text() == (tmp_path / "whole" / REPORT).read_text()
