"""generate, trace and demo as people see them: text, colours, tables, refusals."""

import json
import re
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import engram_lm  # noqa: E402
from engram_lm import cli  # noqa: E402
from engram_lm.bases.recipes import Recipe, build_model, byte_tokenizer  # noqa: E402
from engram_lm.config import MemoryConfig  # noqa: E402
from engram_lm.generation import HeatView, PieceDecoder, prompt_ids  # noqa: E402
from engram_lm.terminal.heat import Scale, legend, paint, wants_colour  # noqa: E402
from speaking import speak  # noqa: E402

RECIPE = Recipe(
    name="doll", vocab_size=258, hidden_size=32, layers=3, heads=2, key_value_heads=1, intermediate_size=64
)
PROMPT = "naïve 日本 🦊."


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A memory whose rows are not zero, saved with its scratch base."""
    directory = tmp_path_factory.mktemp("memory")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    model = build_model(RECIPE, tokenizer=tokenizer)
    torch.manual_seed(3)
    engram_lm.attach(model, tokenizer, MemoryConfig(layers=(0, 2), heads=2, rows_per_head=101, head_width=8))
    for table in engram_lm.memories(model)["memory"].tables:
        table.rows_view().normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    engram_lm.save_memory(model, directory, tokenizer=tokenizer)
    return directory


def without_colour(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# ---- pieces and colours ----------------------------------------------------------------------------------------------


def test_pieces_joined_are_the_text_and_no_character_is_split():
    tokenizer = byte_tokenizer()
    text = "naïve 日本 🦊\n  žluťoučký é"
    decoder = PieceDecoder(tokenizer)
    pieces = [decoder.add(token) for token in tokenizer(text).input_ids] + [decoder.end()]
    assert "".join(pieces) == text
    assert set(pieces) - {""} == set(text)


def test_bytes_that_are_no_character_are_not_held_back_for_ever():
    tokenizer = byte_tokenizer()
    broken = tokenizer("🦊").input_ids[:2]
    decoder = PieceDecoder(tokenizer)
    ids = [*broken, *tokenizer("abc").input_ids, *broken]
    assert "".join([*map(decoder.add, ids), decoder.end()]) == tokenizer.decode(ids)


def test_paint_goes_from_nothing_to_red_and_stops_at_line_ends():
    assert paint("a", 0.0) == "a"
    reds = [int(re.match(r"\x1b\[48;2;(\d+);", paint("a", heat))[1]) for heat in (0.2, 0.5, 1.0)]
    assert reds == sorted(set(reds))
    lines = paint("a\n\nb", 1.0).split("\n")
    assert [without_colour(line) for line in lines] == ["a", "", "b"]
    assert all(line == "" or line.endswith("\x1b[0m") for line in lines)


def test_the_legend_states_the_scale():
    told = without_colour(legend(Scale("share", 0.314, "as asked for"), where="block 3"))
    assert "0.31+" in told
    assert "|added| / |hidden|, block 3; full red: as asked for" in told
    assert "0.5 where rows are zero" in legend(Scale("gate", 1.0, "an open gate"))


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())
    assert wants_colour(Terminal(), "always")


# ---- what heat says --------------------------------------------------------------------------------------------------


def test_empty_rows_are_no_heat_though_the_gate_is_half_open(saved):
    model = engram_lm.from_pretrained(saved)
    tokenizer = byte_tokenizer()
    for table in engram_lm.memories(model)["memory"].tables:
        table.rows_view().zero_()
    ids = prompt_ids(tokenizer, "abc")
    shares = [token.strength for token in speak(model, tokenizer, ids, max_new_tokens=2)]
    gates = [
        token.strength
        for token in speak(model, tokenizer, ids, max_new_tokens=2, view=HeatView(quantity="gate"))
    ]
    assert shares == [0.0] * 5
    assert gates == pytest.approx([0.5] * 5)


def test_heat_is_the_share_of_one_forward_over_the_text(saved):
    model, tokenizer = engram_lm.from_pretrained(saved), byte_tokenizer()
    tokens = list(speak(model, tokenizer, prompt_ids(tokenizer, "abc"), max_new_tokens=4))
    assert [token.is_prompt for token in tokens] == [True] * 3 + [False] * 4
    with torch.no_grad(), engram_lm.trace(model) as records:
        logits = model(torch.tensor([[token.id for token in tokens]])).logits
    assert logits[0, 2:6].argmax(-1).tolist() == [token.id for token in tokens[3:]]
    for block in (None, 0, 2):
        view = HeatView(block=block)
        heat = [
            token.strength
            for token in speak(model, tokenizer, prompt_ids(tokenizer, "abc"), max_new_tokens=4, view=view)
        ]
        assert heat == pytest.approx(view.strengths(records).tolist(), rel=1e-4)


# ---- generate --------------------------------------------------------------------------------------------------------


def test_generate_prints_plain_text_into_a_pipe(saved, capsys):
    assert cli.run(["generate", str(saved), PROMPT, "--max-new-tokens", "6"]) == 0
    plain = capsys.readouterr().out
    assert plain.startswith(PROMPT)
    assert "\x1b" not in plain
    assert cli.run(["generate", str(saved), PROMPT, "--max-new-tokens", "6", "--color", "always"]) == 0
    first, _, rest = capsys.readouterr().out.partition("\n")
    assert without_colour(rest) == plain
    assert "full red: the strongest token of the prompt" in first
    assert "\x1b[48;2;" in rest


def test_generate_follows_its_options(saved, capsys):
    def printed(*options):
        assert cli.run(["generate", str(saved), "abc", "--max-new-tokens", "8", *options]) == 0
        return capsys.readouterr().out

    assert printed("--memory", "off") != printed()
    drawn = ["--temperature", "1.5", "--seed"]
    assert printed(*drawn, "1") == printed(*drawn, "1") != printed(*drawn, "2")
    assert "full red: an open gate" in printed("--color", "always", "--heat", "gate")
    assert "block 2, branch 0; full red: as asked for" in printed(
        "--color", "always", "--block", "2", "--branch", "0", "--full", "0.5"
    )
    assert not printed("--chat").startswith("[")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--block", "1"], "Memory is before blocks 0, 2; got --block 1"),
        (["--branch", "3"], "branches 0 to 0; got --branch 3"),
        (["--memory", "off", "--heat", "gate"], "no effect with --memory off"),
        (["--seed", "3"], "seed has no effect at temperature 0"),
        (["--heat", "gate", "--full", "2"], "--full has no effect with --heat gate"),
        (["--full", "0", "--color", "always"], "must be greater than 0"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--max-new-tokens", "5000"], "exceed the model's 2048"),
        (["--temperature", "-1"], "temperature must be 0 (greedy) or more"),
    ],
)
def test_generate_refuses_in_one_line(options, told, saved, capsys):
    assert cli.run(["generate", str(saved), "abc", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert told in captured.err


def test_directories_that_hold_no_memory_are_told_apart(saved, tmp_path, capsys):
    def refusal(directory):
        assert cli.run(["generate", str(directory), "abc"]) == 2
        return capsys.readouterr().err

    assert "no such directory" in refusal(tmp_path / "none")
    assert "memory.json is missing" in refusal(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert "a run that is not over; it has no checkpoint yet" in refusal(tmp_path)
    for step in (8, 12):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"checkpoint-{step}" / "whole.json").write_text("{}")
    assert "checkpoints/checkpoint-12" in refusal(tmp_path)
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / "rows-memory-2.safetensors").write_bytes(b"short")
    assert "cannot be read" in refusal(tmp_path / "copy")


# ---- trace -----------------------------------------------------------------------------------------------------------


def test_trace_as_json_is_what_the_model_read(saved, capsys):
    assert cli.run(["trace", str(saved), "abc日", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["block"] for row in rows] == [0] * 6 + [2] * 6
    assert rows[2]["ngrams"] == {"2": "bc", "3": "abc"}
    assert all(len(row["addresses"]) == 4 and row["row_norm"] > 0 for row in rows)
    assert cli.run(["trace", str(saved), "abc", "--json", "--block", "2", "--limit", "2"]) == 0
    assert [(row["block"], row["position"]) for row in json.loads(capsys.readouterr().out)] == [
        (2, 0),
        (2, 1),
    ]


def test_trace_prints_a_table_a_layer(saved, capsys):
    assert cli.run(["trace", str(saved), "abc", "--limit", "2"]) == 0
    printed = capsys.readouterr().out
    assert "memory before block 0: 4 rows a token" in printed
    assert "1 more tokens; --limit 0 shows all" in printed
    assert re.search(r'^1 +"b" +"ab" +"ab" +0\.\d{3} +\d+\.\d{3}', printed, re.MULTILINE)


@pytest.mark.parametrize(("text", "told"), [("", "The text is empty"), ("abc", "got --block 9")])
def test_trace_refuses_in_one_line(text, told, saved, capsys):
    assert cli.run(["trace", str(saved), text, "--block", "9"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert told in captured.err


# ---- demo ------------------------------------------------------------------------------------------------------------


def test_demo_shows_both_and_ends_with_what_it_cannot_do(saved, capsys):
    prompts = [{"about": "letters it read", "prompt": "abc"}, {"about": "others", "prompt": "xyz"}]
    (saved / "prompts.json").write_text(json.dumps(prompts))
    assert cli.run(["demo", "--memory", str(saved), "--max-new-tokens", "3", "--color", "always"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("memory on:\n") == printed.count("memory off:\n") == 2
    assert "== letters it read" in printed
    assert "the strongest token of the prompts" in printed
    assert "Up close" in printed
    assert "What it cannot do" in printed.splitlines()[-1]
    assert re.search(r"\[ *\d+\.\d s\] the memory is attached before blocks 0, 2", printed)


def test_demo_refuses_prompts_it_cannot_read(saved, capsys):
    (saved / "prompts.json").write_text('[{"prompt": "abc"}]')
    assert cli.run(["demo", "--memory", str(saved)]) == 2
    assert "is no list of {about, prompt}" in capsys.readouterr().err
    (saved / "prompts.json").unlink()


def test_a_demo_that_is_not_whole_says_so(tmp_path, capsys, monkeypatch):
    assert cli.run(["demo", "--memory", str(tmp_path)]) == 2
    assert "holds no memory: memory.json is missing" in capsys.readouterr().err
    monkeypatch.setattr("engram_lm.demo.files", lambda package: tmp_path)
    for command in ("demo", "serve"):
        assert cli.run([command]) == 2
        assert "holds no memory.json: this installation of engram-lm is not whole." in capsys.readouterr().err
