"""generate --drafts, --session, --most-verbatim, --strict: what they change, what they say, and what they refuse."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engram_lm import cli  # noqa: E402
from engram_lm.generation import Request, TransformersEngine, processor_for, prompt_ids, select, stream  # noqa: E402
from engram_lm.generation.speculative import Drafter  # noqa: E402
from engram_lm.library import Library, Text  # noqa: E402
from engram_lm.mixing import FixedLambda, Gate  # noqa: E402
from engram_lm.mixing.features import NAMES  # noqa: E402
from engram_lm.mixing.gate_provenance import fingerprints  # noqa: E402
from models import saved_doll  # noqa: E402

WORDS = "The office dog is called Orlando and sleeps beside the reception desk until noon."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_doll(tmp_path_factory.mktemp("base"))


@pytest.fixture
def index(base, tmp_path):
    directory = tmp_path / "my notes"
    with Library.create(directory, tokenizer=base[2]) as library:
        library.add(
            [Text(id="dogs.txt", text=WORDS), Text(id="cats.txt", text="The office cat is called Bruno.")]
        )
    return directory


def generate(base, index, capsys, *options, prompt="The office dog is", lam="0.95", n="60"):
    """(what was printed, what was told); asserts that it went well."""
    command = [
        "generate",
        str(base[0]),
        prompt,
        "--index",
        str(index),
        "--max-new-tokens",
        n,
        "--color",
        "never",
    ]
    if lam is not None:
        command += ["--lam", lam]
    assert cli.run([*command, *options]) == 0
    return capsys.readouterr()


def test_drafts_say_the_same_in_fewer_forwards(base, index, capsys):
    for options in ((), ("--temperature", "0.7", "--seed", "3")):
        plain = generate(base, index, capsys, *options)
        drafted = generate(base, index, capsys, *options, "--drafts")
        assert drafted.out == plain.out
        assert "forwards;" not in plain.err
        assert "drafted tokens kept" in drafted.err
    forwards = int(generate(base, index, capsys, "--drafts").err.split(" forwards;")[0].split()[-1])
    assert forwards < 45
    assert "Orlando and sleeps" in plain.out


def test_drafted_tokens_are_handed_out_as_they_come_with_their_share(base, index):
    _, model, tokenizer = base
    ids = prompt_ids(tokenizer, "The office dog is")
    engine = TransformersEngine(model, tokenizer)
    with Library.open(index) as library:
        selection = select(library, "The office dog is", pointing=False)
        parts = {"model": model, "tokenizer": tokenizer}
        plain = list(
            stream(
                engine,
                Request(ids=ids, max_new_tokens=30),
                processor_for(selection, FixedLambda(0.95), ids, **parts),
            )
        )
        processor = processor_for(selection, FixedLambda(0.95), ids, **parts)
        drafter = Drafter(processor)
        said = stream(engine, Request(ids=ids, max_new_tokens=30, watch=False), processor, drafter=drafter)
        first = [next(said) for _ in range(len(ids) + 1)]
        assert [token.is_prompt for token in first] == [True] * len(ids) + [False]
        assert drafter.forwards == 1
        tokens = [*first, *said]
    assert [token.id for token in tokens] == [token.id for token in plain]
    assert [token.strength for token in tokens] == pytest.approx(
        [token.strength for token in plain], abs=1e-4
    )
    assert drafter.forwards < len(tokens) - len(ids)


def test_a_session_finds_what_the_prompt_says(base, index, capsys):
    prompt = "Zanzibar quokkas munch. Zanzibar quok"
    assert "kas munch" not in generate(base, index, capsys, prompt=prompt, n="9").out[len(prompt) :]
    for options in ((), ("--drafts",)):
        told = generate(base, index, capsys, "--session", *options, prompt=prompt, n="9")
        assert told.out[len(prompt) :].startswith("kas munch")


def test_a_cap_on_verbatim_runs_ends_them(base, index, capsys):
    whole = generate(base, index, capsys).out
    assert WORDS[:70] in whole
    for options in ((), ("--drafts",)):
        capped = generate(base, index, capsys, "--most-verbatim", "8", *options).out
        assert WORDS[:24] in capped
        assert WORDS[:30] not in capped


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--drafts"], "--strict and --count belong to"),
        (["--index", "{i}", "--lam", "0.5", "--most-verbatim", "0"], "from 1 on; got 0"),
        (["--index", "{i}", "--lam", "0.5", "--strict"], "--strict is about a gate"),
        (
            ["--index", "{i}", "--lam", "0.5", "--count", "tokens"],
            "--count is documents, sources, or sources:",
        ),
        (["--count", "sources"], "--strict and --count belong to"),
    ],
)
def test_what_has_no_effect_is_refused(base, index, options, said, capsys):
    options = [option.replace("{i}", str(index)) for option in options]
    assert cli.run(["generate", str(base[0]), "The", *options]) == cli.REFUSED
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [["--drafts"], ["--session"], ["--most-verbatim", "9"], ["--count", "sources"]]
)
def test_a_question_that_is_pointed_at_refuses_them(base, index, option, capsys):
    pytest.importorskip("bm25s")
    ask = ["generate", str(base[0]), "What is the office dog called?", "--index", str(index), *option]
    assert cli.run(ask) == cli.REFUSED
    assert "--most-verbatim and --count have no effect" in capsys.readouterr().err
    assert cli.run([*ask, "--lam", "0.9", "--max-new-tokens", "2"]) == 0


def test_one_author_has_one_voice_where_sources_count(base, tmp_path, capsys):
    index = tmp_path / "i"
    with Library.create(index, tokenizer=base[2]) as library:
        for k in range(2):
            library.add([Text(id=f"honest {k}", text="The key is amber.", extra={"author": f"{k}"})])
        library.add(
            [Text(id=f"evil {k}", text="The key is zinc.", extra={"author": "mallory"}) for k in range(9)]
        )
    options = {"prompt": "The key is", "n": "6"}
    assert "zinc" in generate(base, index, capsys, **options).out
    assert "zinc" in generate(base, index, capsys, "--count", "sources", **options).out
    assert "amber" in generate(base, index, capsys, "--count", "sources:author", **options).out


def a_gate(snapshot):
    F = len(NAMES)
    return Gate(
        kind="logistic", mean=[0.0] * F, scale=[1.0] * F, low=[-9.0] * F, high=[9.0] * F,
        weights={"w": [0.0] * F, "b": 2.0}, trained_on={"documents": fingerprints(snapshot)},
    )  # fmt: skip


def test_a_gate_tells_that_its_documents_were_deleted(base, index, tmp_path, capsys):
    path = tmp_path / "gate.json"
    with Library.open(index, "write") as library:
        a_gate(library.store.snapshot()).save(path)
        use = {"lam": None, "n": "2"}
        assert "fitted on" not in generate(base, index, capsys, "--gate", str(path), "--strict", **use).err
        library.delete(["cats.txt"])
        told = generate(base, index, capsys, "--gate", str(path), **use).err
        assert "fitted on 2 documents, of which 1 is no longer in this index" in told
        command = ["generate", str(base[0]), "The", "--index", str(index), "--gate", str(path), "--strict"]
        assert cli.run(command) == cli.REFUSED
        assert "fit it again with engram-lm gate fit" in capsys.readouterr().err
        # words that were changed are another document, the same ones added again are the same
        library.add([Text(id="cats.txt", text="The office cat is called Bruno.")])
        assert "fitted on" not in generate(base, index, capsys, "--gate", str(path), **use).err


def test_gate_report_says_which_are_gone(base, index, tmp_path, capsys):
    path, report = tmp_path / "gate.json", ["gate", "report", str(tmp_path / "gate.json")]
    with Library.open(index, "write") as library:
        a_gate(library.store.snapshot()).save(path)
        assert cli.run([*report, "--index", str(index), "--strict"]) == 0
        assert "all 2 documents it was fitted on are in this index" in capsys.readouterr().out
        library.add([Text(id="dogs.txt", text="Other words.")], existing="replace")
    assert cli.run([*report, "--index", str(index)]) == 0
    assert "of which 1 is no longer in this index as fitted" in capsys.readouterr().out
    assert cli.run([*report, "--index", str(index), "--json"]) == 0
    assert '"documents_gone": 1' in capsys.readouterr().out
    assert cli.run([*report, "--index", str(index), "--strict"]) == cli.REFUSED
    assert cli.run([*report, "--strict"]) == cli.REFUSED
    assert "belong to --index" in capsys.readouterr().err
    assert "Orlando" not in path.read_text()
    assert "dogs" not in path.read_text()
