"""generate --index: the same tokens as transformers with the same processor, what the red means, and what is refused."""

import json
import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engram_lm import cli  # noqa: E402
from engram_lm.errors import MissingExtraError  # noqa: E402
from engram_lm.generation import prompt_ids  # noqa: E402
from engram_lm.library import Library, Text  # noqa: E402
from engram_lm.mixing import FixedLambda, memory_processor  # noqa: E402
from models import saved_doll  # noqa: E402
from speaking import speak  # noqa: E402

WORDS = "The office dog is called Orlando."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_doll(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def index(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("index") / "my notes"
    with Library.create(directory, tokenizer=base[2]) as library:
        library.add([Text(id="dogs.txt", text=WORDS, extra={"licence": "CC0"})])
        library.add([Text(id="a", text="The office cat is called Bruno.")], tenant="acme")
    return directory


def test_speaking_says_what_transformers_generates_with_the_same_processor(base, index):
    _, model, tokenizer = base
    ids = prompt_ids(tokenizer, "The office dog")
    with Library.open(index) as library:
        snapshot = library.store.snapshot()

    def processor():
        return memory_processor(
            snapshot, FixedLambda(0.9), torch.tensor([ids]), tokenizer=tokenizer, model=model
        )

    theirs, ours = processor(), processor()
    wanted = model.generate(
        torch.tensor([ids]), max_new_tokens=24, do_sample=False, logits_processor=[theirs], pad_token_id=0
    )
    tokens = list(speak(model, tokenizer, ids, max_new_tokens=24, processor=ours))
    said = [token.id for token in tokens]
    assert said == wanted[0, : len(said)].tolist()
    assert tokenizer.decode(said[len(ids) :]).startswith(" is called Orlando.")
    new = tokens[len(ids) :]
    steps = theirs.steps(wanted)[0]
    assert [token.strength for token in new] == pytest.approx(
        [step.responsibility for step in steps[: len(new)]]
    )
    assert all(token.strength == 0 and token.step is None for token in tokens[: len(ids)])
    assert max(token.strength for token in new) > 0.9


def without_colour(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_generate_with_an_index_reddens_and_tells_its_documents(base, index, capsys):
    command = ["generate", str(base[0]), "The office dog", "--index", str(index), "--lam", "0.9"]
    assert cli.run([*command, "--max-new-tokens", "19", "--color", "always"]) == 0
    told = capsys.readouterr()
    assert "The office dog is called Orlando." in without_colour(told.out)
    assert "\x1b[48;2;" in told.out
    assert "the part of a token's probability that the index gave" in told.out
    assert "tokens from memory, longest match" in told.err
    assert "dogs.txt (once, licence: CC0)" in told.err
    assert cli.run([*command, "--max-new-tokens", "19", "--tenant", "acme"]) == 0
    told = capsys.readouterr()
    assert "Orlando" not in told.out
    assert "dogs.txt" not in told.err


def test_a_question_is_answered_from_the_documents_it_is_about(base, index, capsys):
    pytest.importorskip("bm25s")
    ask = ["generate", str(base[0]), "What is the office dog called?", "--index", str(index)]
    assert cli.run([*ask, "--max-new-tokens", "9"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("What is the office dog called? Orlando.")
    assert "asked of dogs.txt" in told.err
    assert cli.run([*ask, "--max-new-tokens", "9", "--documents", "dogs.txt"]) == 0
    assert capsys.readouterr().out == told.out
    # a lambda mixes the documents' wording instead; "all" asks no one
    assert cli.run([*ask, "--max-new-tokens", "9", "--lam", "0.9"]) == 0
    assert "asked of dogs.txt" in capsys.readouterr().err
    assert cli.run([*ask, "--max-new-tokens", "2", "--lam", "0.9", "--documents", "all"]) == 0
    assert "asked of" not in capsys.readouterr().err
    assert (
        cli.run([*ask[:2], "Quantum chromodynamics?", *ask[3:], "--lam", "0.9", "--max-new-tokens", "2"]) == 0
    )
    assert "no document is about this question" in capsys.readouterr().err
    assert (
        cli.run(
            [*ask[:2], "The office dog", *ask[3:], "--lam", "0.9", "--max-new-tokens", "2", "--top-k", "1"]
        )
        == 0
    )
    assert "asked of dogs.txt" in capsys.readouterr().err


def test_a_question_without_bm25s_asks_the_whole_index_and_says_so(base, index, capsys, monkeypatch):
    def missing():
        raise MissingExtraError("bm25s is missing.")

    monkeypatch.setattr("engram_lm.library.choosing._library", missing)
    ask = [
        "generate",
        str(base[0]),
        "Orlando?",
        "--index",
        str(index),
        "--lam",
        "0.9",
        "--max-new-tokens",
        "2",
    ]
    assert cli.run(ask) == 0
    assert "The whole index answers. bm25s is missing." in capsys.readouterr().err
    assert cli.run([*ask, "--top-k", "2"]) == cli.REFUSED
    assert "bm25s is missing." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--index", "{i}", "--documents", "cats.txt", "--lam", "0.5"], "no document 'cats.txt'"),
        (["--index", "{i}", "--documents", "all", "--documents", "dogs.txt"], "auto, all, or ids"),
        (["--index", "{i}", "--documents", "all", "--top-k", "3"], "belongs to --documents auto"),
        (["--index", "{i}", "--top-k", "0"], "1 or more documents; got 0"),
        (["--top-k", "3"], "belong to --index"),
        (["--index", "{i}"], "No gate is shipped for this model"),
        (["--index", "{i}", "--lam", "2"], "lambda"),
        (["--index", "{i}", "--lam", "0.5", "--gate", "g.json"], "exclude each other"),
        (["--index", "{i}", "--lam", "0.5", "--heat", "gate"], "leave out --heat"),
        (["--index", "{i}", "--lam", "0.5", "--tier", "disk"], "--tier is not for --index"),
        (["--index", "absent", "--lam", "0.5"], "absent holds no index"),
        (["--lam", "0.5"], "belong to --index"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused(base, index, options, said, capsys):
    options = [option.replace("{i}", str(index)) for option in options]
    assert cli.run(["generate", str(base[0]), "The", *options]) == cli.REFUSED
    assert said in capsys.readouterr().err


def test_a_gate_is_fitted_reported_drawn_and_used(base, tmp_path, capsys):
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    texts = [
        Text(id=str(k), text=" ".join(words[(k + i * (k + 1)) % 10] for i in range(60))) for k in range(6)
    ]
    with Library.create(tmp_path / "index", tokenizer=base[2]) as library:
        library.add(texts)
    (tmp_path / "general.txt").write_text(
        "\n\n".join("".join(chr(97 + (i * k) % 26) for i in range(200)) for k in range(3, 9))
    )
    fit = [
        "gate",
        "fit",
        str(base[0]),
        "--index",
        str(tmp_path / "index"),
        "--general",
        str(tmp_path / "general.txt"),
    ]
    # one file is one document; a gate needs more
    assert cli.run([*fit, "--out", str(tmp_path / "gate.json")]) == cli.REFUSED
    assert "at least 2 documents in the index and 2 general texts" in capsys.readouterr().err
    with open(tmp_path / "general.jsonl", "w") as file:
        for paragraph in (tmp_path / "general.txt").read_text().split("\n\n"):
            file.write(json.dumps({"text": paragraph}) + "\n")
    fit[-1] = str(tmp_path / "general.jsonl")
    assert (
        cli.run(
            [*fit, "--out", str(tmp_path / "gate.json"), "--texts", "4", "--plot", str(tmp_path / "p.png")]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "a logistic gate for" in told
    assert "where it was held to +0.50 %" in told
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    # every document of the index took part, and the file holds none of their names or words
    kept = json.loads((tmp_path / "gate.json").read_text())["trained_on"]["documents"]
    assert [len(name) for name in kept] == [12] * 6
    assert (
        cli.run(
            ["gate", "report", str(tmp_path / "gate.json"), "--index", str(tmp_path / "index"), "--strict"]
        )
        == 0
    )
    assert "all 6 documents it was fitted on are in this index" in capsys.readouterr().out
    assert cli.run([*fit, "--out", str(tmp_path / "gate.json")]) == cli.REFUSED
    assert "exists already" in capsys.readouterr().err
    use = [
        "generate",
        str(base[0]),
        "alpha beta",
        "--index",
        str(tmp_path / "index"),
        "--max-new-tokens",
        "3",
    ]
    assert cli.run([*use, "--gate", str(tmp_path / "gate.json")]) == 0
    capsys.readouterr()
    assert cli.run(["gate", "report", str(tmp_path / "gate.json"), "--json"]) == 0
    assert '"worst_general"' in capsys.readouterr().out
    assert cli.run(["gate", "report", str(tmp_path / "absent.json")]) == cli.REFUSED
