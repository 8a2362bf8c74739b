"""The endpoints of `engram-lm serve`, with a tiny random model: what they answer, and what they refuse."""

import json
import math
import threading
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("fastapi")

from pydantic import TypeAdapter  # noqa: E402

from engram_lm.attachment import memory_off, trace  # noqa: E402
from engram_lm.generation import processor_for, prompt_ids, select  # noqa: E402
from engram_lm.library import Library, Text  # noqa: E402
from engram_lm.mixing import FixedLambda, rules_of, score  # noqa: E402
from engram_lm.serve import schema as m  # noqa: E402
from engram_lm.serve.served_mixture import ServedMixture  # noqa: E402
from serve_support import DOCUMENTS, LIMITS, served, words  # noqa: E402
from speaking import speak  # noqa: E402

DOG = "The office dog is called"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with served(tmp_path_factory.mktemp("served")) as found:
        yield found


def checked(model, answer):
    """The JSON of an answer that OpenAPI's model takes as it is."""
    assert answer.status_code == 200, answer.text
    found = answer.json()
    TypeAdapter(model).validate_python(found)
    return found


def refused(answer, status):
    """The sentence of a refusal."""
    assert answer.status_code == status, answer.text
    found = answer.json()
    assert set(found) == {"error"}
    assert found["error"].strip().endswith((".", ")"))
    assert "Traceback" not in found["error"]
    return found["error"]


# ---- what there is ----------------------------------------------------------------------------------------------------


def test_health_and_about(site):
    assert checked(m.Health, site.get("/api/health")) == {"status": "ready", "busy": False, "waiting": 0}
    about = checked(m.About, site.get("/api/about"))
    assert about["tables"]["layers"] == [1, 2]
    assert about["tables"]["orders"] == [2, 3]
    assert about["index"]["documents"] >= 2
    assert about["limits"]["text_tokens"] == LIMITS.text_tokens


def test_the_description_names_every_endpoint_and_its_errors(site):
    paths = site.get("/api/openapi.json").json()["paths"]
    assert {"/api/trace", "/api/generate", "/api/index/add", "/api/quiz/answer"} <= set(paths)
    assert "403" in paths["/api/trace"]["post"]["responses"]
    assert paths["/api/trace"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]


# ---- trace ------------------------------------------------------------------------------------------------------------


def test_trace_says_what_the_model_and_the_index_do(site):
    text = "The office dog is called Orlando."
    found = checked(m.Trace, site.post("/api/trace", {"text": text}))["tokens"]
    assert "".join(token["text"] for token in found) == text
    model, ids = site.service.loaded.model, words()(text).input_ids
    with torch.no_grad(), trace(model) as records:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    with torch.no_grad(), memory_off(model):
        off = model(torch.tensor([ids]), use_cache=False).logits[0]
    for logit, name in ((logits, "loss_tables"), (off, "loss_off")):
        wanted = torch.nn.functional.cross_entropy(logit[:-1], torch.tensor(ids[1:]), reduction="none")
        assert [token[name] for token in found[1:]] == pytest.approx(wanted.tolist(), rel=1e-4, abs=1e-4)
        assert found[0][name] is None
    snapshot = site.service.shelf.snapshot()
    scored = score(
        model, torch.tensor(ids), snapshot, FixedLambda(0.9), rules=rules_of(words(), model, snapshot)
    )
    assert [token["loss"] for token in found[1:]] == pytest.approx((-scored.log_p[0, 1:]).tolist(), rel=1e-3)
    assert [token["index"]["r"] for token in found[1:]] == pytest.approx(
        scored.responsibility[0, 1:].tolist(), rel=1e-3
    )
    record, last = records[0], found[-1]["tables"][0]
    assert [part["layer"] for part in found[-1]["tables"]] == [1, 2]
    assert last["gates"] == pytest.approx(record.gate[0, -1].tolist(), rel=1e-4)
    assert last["added"] == pytest.approx(float(record.share[0, -1].max()), rel=1e-4)
    assert [row for ngram in last["ngrams"] for row in ngram["addresses"]] == record.address[0, -1].tolist()
    heads = record.heads
    assert [ngram["norm"] for ngram in last["ngrams"]] == pytest.approx(
        [float(np.linalg.norm(record.row_norm[0, -1, o * heads : (o + 1) * heads])) for o in range(2)],
        rel=1e-4,
    )
    assert [ngram["text"] for ngram in last["ngrams"]] == ["o.", "do."]


def test_losses_without_tables_may_come_later(site):
    text = "The office dog is called Orlando."
    whole = checked(m.Trace, site.post("/api/trace", {"text": text}))["tokens"]
    sooner = checked(m.Trace, site.post("/api/trace", {"text": text, "without": False}))["tokens"]
    assert {token.pop("loss_off") for token in sooner} == {None}
    off = [token.pop("loss_off") for token in whole]
    for token, wanted in zip(sooner, whole, strict=True):
        assert_alike(token, wanted)
    for tables, wanted in ((False, off), (True, [token["loss_tables"] for token in whole])):
        losses = checked(m.Losses, site.post("/api/losses", {"text": text, "tables": tables}))["losses"]
        assert losses[0] is wanted[0] is None
        assert losses[1:] == pytest.approx(wanted[1:], rel=1e-4, abs=1e-4)
    assert off[1:] != pytest.approx([token["loss_tables"] for token in whole[1:]], rel=1e-4, abs=1e-4)


def assert_alike(found, wanted):
    """Equal but for the last digits: rows of one forward and of two are not the same sums."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_alike(found[key], wanted[key])
    elif isinstance(wanted, list):
        for one, other in zip(found, wanted, strict=True):
            assert_alike(one, other)
    else:
        assert found == (pytest.approx(wanted, rel=1e-3, abs=1e-5) if isinstance(wanted, float) else wanted)


def test_trace_counts_ngrams_of_the_index(site):
    found = site.post("/api/trace", {"text": "he d"}).json()["tokens"]
    texts = DOCUMENTS.values()
    assert [entry["count"] for entry in found[2]["seen"]] == [
        sum(text.count(ngram) for text in texts) for ngram in (" ", "e ", "he ")
    ]
    assert found[1]["seen"][2]["count"] == 0, "there are no three tokens yet"


def test_tables_and_index_may_be_absent(tmp_path):
    with served(tmp_path, tables=False, index=False) as bare:
        found = checked(m.Trace, bare.post("/api/trace", {"text": "The cat"}))["tokens"]
        assert found[3]["tables"] is None
        assert found[3]["index"] is None
        assert found[3]["loss_tables"] is None
        assert found[3]["loss"] == found[3]["loss_off"]
        assert found[3]["seen"][0] == {"order": 1, "count": None}
        about = checked(m.About, bare.get("/api/about"))
        assert about["tables"] is about["index"] is about["gate"] is None
        told = checked(m.Next, bare.post("/api/next", {"prompt": DOG, "candidates": ["Max"]}))
        assert told["match"] is None
        assert told["memory"] == []
        assert told["lambda"] == 0
        assert told["mix"] == told["model"]
        assert "--index" in refused(bare.get("/api/index/documents"), 404)
        assert "--index" in refused(
            bare.post("/api/generate", {"prompt": DOG, "arm": "memory", "max_tokens": 4}), 422
        )


# ---- next -------------------------------------------------------------------------------------------------------------


def test_next_shows_model_memory_and_mixture(site):
    asked = {"prompt": DOG, "k": 1000, "candidates": ["Orlando", "Max"]}
    found = checked(m.Next, site.post("/api/next", asked))
    assert found["lambda"] == pytest.approx(0.9)
    assert found["match"]["depth"] == len(DOG)
    assert found["match"]["text"] == DOG
    assert found["memory"][0]["text"] == " "
    assert found["sources"][0]["document"] == "dogs.md"
    assert found["sources"][0]["passage"]["match"] == DOG
    of = {name: {token["id"]: token["p"] for token in found[name]} for name in ("model", "memory", "mix")}
    assert sum(of["model"].values()) == pytest.approx(1)
    assert sum(of["memory"].values()) == pytest.approx(1)
    for token, p in of["mix"].items():
        assert p == pytest.approx(0.1 * of["model"][token] + 0.9 * of["memory"].get(token, 0), rel=1e-6)


def test_candidates_get_what_a_scored_text_gets(site):
    found = site.post("/api/next", {"prompt": DOG, "candidates": ["Orlando", "Max"]}).json()["candidates"]
    for candidate in found:
        ids = words()(f"{DOG} {candidate['text']}").input_ids
        model, snapshot = site.service.loaded.model, site.service.shelf.snapshot()
        scored = score(
            model, torch.tensor(ids), snapshot, FixedLambda(0.9), rules=rules_of(words(), model, snapshot)
        )
        tail = slice(len(DOG), None)
        assert [token["id"] for token in candidate["tokens"]] == ids[len(DOG) :]
        assert [math.log(token["p_model"]) for token in candidate["tokens"]] == pytest.approx(
            scored.log_p_model[0, tail].tolist(), rel=1e-3
        )
        mixed = [
            (1 - token["lambda"]) * token["p_model"] + token["lambda"] * token["p_memory"]
            for token in candidate["tokens"]
        ]
        assert np.log(mixed).tolist() == pytest.approx(scored.log_p[0, tail].tolist(), rel=5e-2, abs=5e-2)


@pytest.mark.parametrize("lam", [0, 0.25, 1])
def test_a_pinned_lambda_mixes_the_lists_and_leaves_the_gates_at_candidates(site, lam):
    found = site.post("/api/next", {"prompt": DOG, "lam": lam, "candidates": ["Orlando"], "k": 1000}).json()
    assert found["lambda"] == lam
    first = found["memory"][0]
    model = {token["id"]: token["p"] for token in found["model"]}
    mixed = {token["id"]: token["p"] for token in found["mix"]}
    assert mixed[first["id"]] == pytest.approx((1 - lam) * model[first["id"]] + lam * first["p"])
    assert {token["lambda"] for token in found["candidates"][0]["tokens"]} == {0.9}


def test_next_without_index_or_tables(site):
    whole, bare = (
        site.post("/api/next", {"prompt": DOG, "tables": tables, "index": False}).json()
        for tables in (True, False)
    )
    assert whole["match"] is None
    assert whole["mix"] == whole["model"] != bare["model"]


def test_chinese_candidates_follow_without_a_blank(site):
    found = site.post("/api/next", {"prompt": "医学家", "candidates": ["张"]}).json()["candidates"][0]
    assert [token["id"] for token in found["tokens"]] == words()("张").input_ids


# ---- generate ---------------------------------------------------------------------------------------------------------


def text_of(events):
    return "".join(event.get("text", "") for event in events)


def test_generation_is_the_command_lines(site):
    events = site.events(prompt=DOG, arm="memory", max_tokens=9)
    assert [event["type"] for event in events] == ["start", *["token"] * 9, "done"]
    TypeAdapter(list[m.Event]).validate_python(events)
    shelf, loaded = site.service.shelf, site.service.loaded
    ids = prompt_ids(words(), DOG)
    selection = select(shelf.library, DOG, pointing=False)
    processor = processor_for(selection, FixedLambda(0.9), ids, model=loaded.model, tokenizer=words())
    wanted = [
        token
        for token in speak(loaded.model, words(), ids, max_new_tokens=9, processor=processor)
        if not token.is_prompt
    ]
    tokens = events[1:-1]
    assert [token["id"] for token in tokens] == [token.id for token in wanted]
    assert [token["r"] for token in tokens] == pytest.approx([token.strength for token in wanted], rel=1e-5)
    assert [token["tables"] for token in tokens] == pytest.approx([min(1, token.share) for token in wanted])
    assert text_of(events) == " Orlando."
    assert events[-1]["prompt_tokens"] == events[0]["prompt_tokens"] == len(ids)
    assert any("dogs.md" in line for line in events[-1]["told"])


def test_the_three_arms_and_the_tables(site):
    alone = site.events(prompt="The cat", max_tokens=6)
    bare = site.events(prompt="The cat", max_tokens=6, tables=False)
    assert text_of(alone) != text_of(bare)
    assert {event["r"] for event in alone[1:-1]} == {0}
    assert {event["tables"] for event in bare[1:-1]} == {None}
    retrieval = site.events(prompt="office dog", arm="retrieval", max_tokens=2)
    assert retrieval[0]["retrieved"] == ["dogs.md"]
    assert retrieval[0]["prompt_tokens"] == len(DOCUMENTS["dogs.md"]) + 2 + len("office dog")
    assert "stand in the prompt" in retrieval[-1]["told"][-1]


def test_a_question_is_answered_by_pointing_where_no_lambda_is_fixed(tmp_path, monkeypatch):
    with served(tmp_path) as found:
        monkeypatch.setattr(found.service.mixed, "lam", None)
        events = found.events(prompt="What is the office dog called?", chat=True, arm="memory", max_tokens=4)
        assert any("asked of dogs.md" in line for line in events[-1]["told"])


def test_a_temperature_draws_from_its_seed(site):
    runs = [text_of(site.events(prompt=DOG, max_tokens=12, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_special_tokens_in_a_text_are_letters(site):
    found = site.post("/api/trace", {"text": "a<eos>"}).json()["tokens"]
    assert len(found) == 6
    events = site.events(prompt="a<eos>", chat=True, max_tokens=1)
    assert events[0]["prompt_tokens"] == len("Q: a<eos>\nA:")


# ---- the index --------------------------------------------------------------------------------------------------------


def test_teach_ask_delete(site):
    text = "The tide clock is called Petrel."
    added = checked(
        m.Added,
        site.post("/api/index/add", {"documents": [{"id": "clock.md", "text": text, "title": "Clocks"}]}),
    )
    assert added["tokens"] == len(text)
    assert "indexed 32 tokens" in added["log"][0]
    assert text_of(site.events(prompt="The tide clock is called", arm="memory", max_tokens=8)) == " Petrel."
    hits = checked(m.Found, site.post("/api/index/search", {"text": "tide clock"}))["hits"]
    assert hits[0]["title"] == "Clocks"
    assert hits[0]["passage"] == {"before": "The ", "match": "tide clock", "after": " is called Petrel."}
    told = checked(m.Explained, site.post("/api/index/explain", {"text": "The tide clock is called"}))
    assert told["depth"] == 24
    assert told["orders"][24] == {"order": 24, "count": 1, "distinct": 1}
    assert told["continuations"][0]["text"] == " "
    listed = checked(m.Documents, site.get("/api/index/documents?limit=1"))
    assert listed["documents"][0]["id"] == listed["next"] == "clock.md"
    following = site.get("/api/index/documents?after=clock.md").json()
    assert [document["id"] for document in following["documents"]] == ["dogs.md", "leave.md"]
    assert following["documents"][0]["tokens"] == len(DOCUMENTS["dogs.md"])
    assert following["next"] is None

    held = refused(site.post("/api/index/add", {"documents": [{"id": "clock.md", "text": "x"}]}), 409)
    assert "replace" in held
    again = site.post("/api/index/add", {"documents": [{"id": "clock.md", "text": text}], "replace": True})
    assert again.json()["generation"] == added["generation"] + 1

    both = {"ids": ["clock.md", "nothing.md"]}
    assert "nothing.md" in refused(site.post("/api/index/delete", both), 404)
    gone = checked(m.Deleted, site.post("/api/index/delete", {"ids": ["clock.md"]}))
    assert gone["deleted"] == ["clock.md"]
    twice = refused(site.post("/api/index/delete", {"ids": ["clock.md"]}), 404)
    assert "clock.md" in twice
    assert " Petrel." not in text_of(
        site.events(prompt="The tide clock is called", arm="memory", max_tokens=8)
    )
    assert site.post("/api/index/search", {"text": "tide clock"}).json()["hits"] == []


def test_changes_of_another_process_are_seen(site):
    assert site.post("/api/index/search", {"text": "heaviest anvil"}).json()["count"] == 0
    with Library.open(site.service.shelf.directory, "write") as other:
        other.add([Text(id="anvil.md", text="The heaviest anvil is Little Agatha.")])
    assert site.post("/api/index/search", {"text": "heaviest anvil"}).json()["count"] == 1
    assert text_of(site.events(prompt="The heaviest anvil is", arm="memory", max_tokens=7)) == " Little"
    with Library.open(site.service.shelf.directory, "write") as other:
        other.delete(["anvil.md"])
    assert site.post("/api/index/search", {"text": "heaviest anvil"}).json()["count"] == 0


def test_a_change_does_not_wait_for_what_is_worked_out_beforehand(tmp_path, monkeypatch):
    begun, ended = threading.Event(), threading.Event()

    def prepare(self, going) -> None:
        begun.set()
        while going():
            time.sleep(0.001)
        ended.set()

    monkeypatch.setattr(ServedMixture, "prepare", prepare)
    with served(tmp_path) as found:
        assert begun.wait(30)
        body = {"documents": [{"id": "late.md", "text": "Late."}]}
        assert found.post("/api/index/add", body).status_code == 200
        assert ended.is_set()
    ended.clear()
    with served(tmp_path / "another"):
        pass  # closing does not wait for it either
    assert ended.is_set()


def test_an_empty_index_is_no_index_to_the_model(tmp_path):
    with served(tmp_path) as found:
        found.post("/api/index/delete", {"ids": list(DOCUMENTS)})
        tokens = checked(m.Trace, found.post("/api/trace", {"text": "The"}))["tokens"]
        assert tokens[2]["index"] is None
        assert tokens[2]["loss"] == tokens[2]["loss_tables"]
        assert checked(m.Next, found.post("/api/next", {"prompt": DOG}))["match"] is None
        assert found.events(prompt=DOG, arm="memory", max_tokens=2)[-1]["type"] == "done"
        assert found.events(prompt=DOG, arm="retrieval", max_tokens=2)[0]["retrieved"] == []
        assert found.get("/api/index/documents").json() == {"documents": [], "next": None}


# ---- the quiz ---------------------------------------------------------------------------------------------------------


def test_quiz_keeps_answers_until_they_are_asked_for(site):
    questions = checked(m.Quiz, site.get("/api/quiz"))["questions"]
    assert [(question["id"], question["kind"], question["chat"]) for question in questions] == [
        ("dog", "verbatim", False),
        ("leave", "paraphrased", True),
    ]
    assert "Orlando" not in json.dumps(questions)
    own = checked(m.QuizAnswered, site.post("/api/quiz/answer", {"id": "dog", "answer": "orlando!"}))
    assert own == {"right": True, "expected": "Orlando"}
    memory = checked(m.QuizAnswered, site.post("/api/quiz/answer", {"id": "dog", "arm": "memory"}))
    assert memory["right"]
    assert memory["answer"].startswith("Orlando.")
    alone = site.post("/api/quiz/answer", {"id": "dog", "arm": "alone"}).json()
    assert not alone["right"]
    assert "no question" in refused(site.post("/api/quiz/answer", {"id": "cat", "arm": "alone"}), 404)
    refused(site.post("/api/quiz/answer", {"id": "dog"}), 422)


# ---- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        ("/api/trace", {"text": ""}, 422, "empty"),
        ("/api/trace", {"text": "x" * 101}, 413, "101 tokens; at most 100"),
        ("/api/trace", {"text": "x" * 90_000}, 413, "90,000 characters"),
        ("/api/trace", {"text": "x" * 1_000_000}, 413, "larger than"),
        ("/api/trace", {"text": 5}, 422, "text"),
        ("/api/trace", {}, 422, "text"),
        ("/api/trace", {"text": "a", "colour": "red"}, 422, "colour"),
        ("/api/trace", [1], 422, "request"),
        ("/api/next", {"prompt": ""}, 422, "prompt is empty"),
        ("/api/next", {"prompt": "a", "lam": 1.5}, 422, "lam"),
        ("/api/next", {"prompt": "a", "candidates": [" "]}, 422, "candidate is empty"),
        ("/api/next", {"prompt": "a", "candidates": ["x" * 40]}, 413, "candidate has 41 tokens"),
        ("/api/next", {"prompt": "a", "candidates": ["x"] * 9}, 422, "candidates"),
        ("/api/generate", {"prompt": ""}, 422, "prompt is empty"),
        ("/api/generate", {"prompt": " ", "chat": True}, 422, "prompt is empty"),
        ("/api/generate", {"prompt": "a", "max_tokens": 65}, 422, "at most 64"),
        ("/api/generate", {"prompt": "a" * 100, "max_tokens": 64}, 422, "exceed the model's 128"),
        ("/api/generate", {"prompt": "a", "arm": "both"}, 422, "arm"),
        (
            "/api/generate",
            {"prompt": "a", "arm": "memory", "documents": ["no.md"], "max_tokens": 1},
            404,
            "no.md",
        ),
        ("/api/index/add", {"documents": []}, 422, "documents"),
        ("/api/index/add", {"documents": [{"id": "", "text": "a"}]}, 422, "id"),
        ("/api/index/add", {"documents": [{"id": "a\nb", "text": "a"}]}, 422, "printable"),
        ("/api/index/add", {"documents": [{"id": "a", "text": " \n"}]}, 422, "empty"),
        ("/api/index/add", {"documents": [{"id": "a", "text": "x"}] * 2}, 422, "twice"),
        ("/api/index/delete", {"ids": []}, 422, "ids"),
        ("/api/index/search", {"text": "  "}, 422, "empty"),
        ("/api/index/search", {"text": "a" * 4001}, 413, "4,001 characters"),
        ("/api/index/explain", {"text": ""}, 422, "empty"),
    ],
)
def test_refusals_say_what_was_wrong(site, path, body, status, told):
    assert told in refused(site.post(path, body), status)


def test_bodies_that_are_no_json(site):
    token = {"x-engram-token": site.access.token}

    def post(data, kind="application/json"):
        return site.client.post("/api/trace", content=data, headers={**token, "content-type": kind})

    assert "Byte 10" in refused(post(b'{"text": "\xff\xfe"}'), 422)
    assert "no JSON" in refused(post(b"text=a"), 422)
    assert "no JSON" in refused(post(b"[" * 50_000), 422)
    assert "application/json" in refused(post(b'{"text": "a"}', "text/plain"), 415)
    assert "larger" in refused(post(b" " * 200_000), 413)
    # half a surrogate pair is a character to JSON alone
    refused(post(b'{"text": "\\ud800"}'), 422)

    def chunks():
        for _ in range(200):
            yield b" " * 1000

    assert "larger" in refused(post(chunks()), 413)


@pytest.mark.parametrize(
    "text",
    ["🦔 and 👩‍🔬", "שלום עולם", "مرحبا بالعالم", "<script>alert(1)</script>", "a\x00b\r\n\t", "四大发明"],
)
def test_any_text_comes_back_as_it_was(site, text):
    tokens = checked(m.Trace, site.post("/api/trace", {"text": text}))["tokens"]
    assert "".join(token["text"] for token in tokens) == text
    name = "odd <b>.md"
    body = {"documents": [{"id": name, "text": f"before {text} after"}]}
    assert site.post("/api/index/add", body).status_code == 200
    hit = site.post("/api/index/search", {"text": f"before {text}"}).json()["hits"][0]
    assert hit["document"] == name
    assert hit["passage"]["match"] == f"before {text}"
    events = site.events(prompt=f"before {text}", arm="memory", max_tokens=6)
    assert text_of(events) == " after"
    assert site.post("/api/index/delete", {"ids": [name]}).status_code == 200


def test_what_is_unexpected_is_not_told(site, monkeypatch, caplog):
    monkeypatch.setattr(site.service.shelf, "search", lambda *_, **__: 1 / 0)
    told = refused(site.post("/api/index/search", {"text": "dog"}), 500)
    assert "division" not in told
    assert "division" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(site.service, "mixed", object())
    refused(site.post("/api/trace", {"text": "dog"}), 500)
    monkeypatch.undo()
    assert site.post("/api/trace", {"text": "dog"}).status_code == 200


def test_nothing_else_is_served(site):
    assert "nothing at" in refused(site.get("/nothing"), 404)
    assert "not used" in refused(site.get("/api/trace"), 405)
    for name in (
        "../app.py",
        "..%2fapp.py",
        "%2e%2e/app.py",
        "index.html",
        ".hidden",
        "a%00.js",
        "nothing.js",
    ):
        assert site.get(f"/static/{name}").status_code in (404, 307)
