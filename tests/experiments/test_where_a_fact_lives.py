"""The phone book of experiments/where_a_fact_lives: what it holds, how bits are counted, that arms cost the same, one run."""

import importlib
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from places import ROOT

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

HERE = ROOT / "experiments" / "where_a_fact_lives"
NAMES = ("book", "models", "learn", "asked", "surgery", "tables", "figures")


@pytest.fixture(scope="module")
def parts():
    """The experiment's modules, which have plain names: taken out of sys.modules again."""
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    sys.path.insert(0, str(HERE))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(HERE))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(scope="module")
def book(parts):
    return parts["book"].make_book(parts["book"].SIZES["quick"], seed=3)


def name_of(row, book):
    """The tokens of a row that are parts of a name, and where the answer begins."""
    return tuple(int(token) for token in row if 3 <= token < book.first_value)


# ---- the book --------------------------------------------------------------------------------------------------------


def test_one_seed_gives_one_book_and_another_seed_another(parts, book):
    same = parts["book"].make_book(book.size, seed=3)
    other = parts["book"].make_book(book.size, seed=4)
    assert np.array_equal(book.name_N3, same.name_N3)
    assert np.array_equal(book.value_NA, same.value_NA)
    assert not np.array_equal(book.value_NA, other.value_NA)


def test_every_question_has_one_answer(parts):
    """No two names hold the same parts; no question in any form without filler begins another one or is one."""
    book = parts["book"].make_book(parts["book"].SIZES["small"], seed=0)
    assert len({tuple(sorted(name)) for name in book.name_N3.tolist()}) == len(book)
    asked = [
        tuple(book.question(entry, form, ())) for entry in range(len(book)) for form in ("plain", "reworded")
    ]
    assert len(set(asked)) == len(asked)
    whole = set(asked)
    for question in asked:
        assert not any(question[:length] in whole for length in range(2, len(question)))


def test_half_of_the_names_have_two_parts_and_bits_are_balanced(book):
    assert (book.parts_N == 2).sum() == len(book) // 2
    assert set(book.parts_N) == {2, 3}
    # 2,000 draws of 32 values: mean 15.5, standard error 0.21
    assert abs(book.value_NA.mean() - 15.5) < 1
    assert book.bits == 50 * len(book)


def test_a_pass_reads_every_entry_once_in_a_form_it_is_allowed(parts, book):
    forms = parts["book"].FORMS
    by_name = {tuple(sorted(x for x in name if x >= 0)): i for i, name in enumerate(book.name_N3.tolist())}
    other = set()
    for epoch in range(4):
        seen = []
        for batch in parts["book"].batches(book, epoch=epoch, size=32, seed=0):
            assert len(batch) <= 32
            assert (batch != 0).all()  # rows of one length: nothing is padded
            for row in batch:
                entry = by_name[tuple(sorted(name_of(row, book)))]
                seen.append(entry)
                assert np.array_equal(row[-10:] - book.first_value, book.value_NA[entry])
                reworded, filler = 2 in row, (row >= book.first_filler).any()
                assert reworded <= (forms[book.form_N[entry]] == "reworded")
                assert filler <= (forms[book.form_N[entry]] == "filler")
                if reworded or filler:
                    other.add(entry)
        assert sorted(seen) == list(range(len(book)))
    assert {forms[book.form_N[entry]] for entry in other} == {"filler", "reworded"}


def test_the_order_of_a_pass_belongs_to_seed_and_epoch(parts, book):
    def first(epoch, seed):
        return next(iter(parts["book"].batches(book, epoch=epoch, size=32, seed=seed))).tolist()

    assert first(0, 0) == first(0, 0)
    assert first(0, 0) != first(1, 0)
    assert first(0, 0) != first(0, 1)


def test_questions_ask_every_entry_in_the_form_wanted(parts, book):
    found = {}
    for which, rows in parts["book"].questions(book, np.arange(len(book)), form="filler", filler=8, size=64):
        assert ((rows >= book.first_filler).sum(1) == 8).all()
        found |= dict(zip(which.tolist(), rows, strict=True))
    assert sorted(found) == list(range(len(book)))
    for entry, row in found.items():
        assert name_of(row, book) == tuple(x for x in book.name_N3[entry].tolist() if x >= 0)


# ---- bits ------------------------------------------------------------------------------------------------------------


def test_bits_of_logits_that_are_known_by_construction(parts):
    """Certain: 50 bits. Even over 32 answers: 0. Half of the mass on the right one of 32 and half elsewhere: 4 a token."""
    bits_of = parts["asked"].bits_of
    answer = torch.arange(10)[None] + 3
    even = torch.full((1, 10, 60), -torch.inf)
    even[..., 3:35] = 0.0
    certain = even.scatter(-1, answer[..., None], 200.0)
    half = even.scatter(-1, answer[..., None], math.log(31.0))
    for logits, bits, full in ((certain, 50.0, True), (even, 0.0, False), (half, 40.0, True)):
        got, said = bits_of(logits, answer)
        assert got[0] == pytest.approx(bits, abs=1e-5)  # logits are float32
        assert bool(said[0]) is full
    wrong = certain.clone()
    wrong[0, 9] = even[0, 9]
    wrong[0, 9, 20] = 3.0
    got, said = bits_of(wrong, answer)
    assert not said[0]
    # nine certain tokens and one with probability 1 / (31 + e^3)
    assert got[0] == pytest.approx(50 - math.log2(31 + math.exp(3)), abs=1e-5)


def test_probability_outside_the_answers_counts_as_lost(parts):
    logits = torch.zeros(1, 10, 64)  # even over 64 ids, of which 32 are answers
    got, _ = parts["asked"].bits_of(logits, torch.full((1, 10), 40))
    assert got[0] == pytest.approx(-10.0)


def test_an_interval_covers_the_mean_and_shrinks(parts):
    values = np.random.default_rng(0).normal(7, 1, 4_000)
    low, high = parts["asked"].interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(4_000), rel=0.15)


# ---- arms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["quick", "cpu"])
def test_arms_have_equal_parameters_and_equal_flops(parts, size):
    models = parts["models"]
    book = parts["book"].make_book(parts["book"].SIZES["quick"], seed=0)
    numbers = {
        name: models.account(models.build(book, models.SHAPES[size], arm, seed=0)[0])
        for name, arm in models.ARMS.items()
    }
    for key, apart in (("total", 0.025), ("flops_per_token", 0.015)):
        values = [one[key] for one in numbers.values()]
        assert (max(values) - min(values)) / max(values) < apart, key
    assert numbers["none"]["rows"] == 0
    assert numbers["memory"]["rows"] / numbers["memory"]["sparse"] == pytest.approx(0.21, abs=0.025)
    assert numbers["mostly-memory"]["rows"] / numbers["mostly-memory"]["sparse"] == pytest.approx(
        0.79, abs=0.02
    )
    for name in ("one-row", "shuffled", "frozen-random"):
        assert numbers[name] == numbers["memory"]


def test_accounting_counts_every_parameter_of_the_plain_arm(parts, book):
    models = parts["models"]
    model, _ = models.build(book, models.SHAPES["quick"], models.ARMS["none"], seed=0)
    numbers = models.account(model)
    assert numbers["total"] == sum(parameter.numel() for parameter in model.parameters())
    experts = [parameter for name, parameter in model.named_parameters() if "experts" in name]
    assert numbers["experts"] == sum(parameter.numel() for parameter in experts)
    assert numbers["sparse"] == numbers["experts"] * 9 // 11  # a token visits 2 of 11


def test_only_what_an_arm_names_trains_as_rows_do(parts, book):
    models = parts["models"]
    for name, slow in (("none", 0), ("embedding-5x", 1), ("experts-5x", 2)):
        model, _ = models.build(book, models.SHAPES["quick"], models.ARMS[name], seed=0)
        made = models.groups(model, models.ARMS[name], rate=1e-3, decay=0.1)
        fast = [
            p for group in made if group["lr"] == 5e-3 and group["weight_decay"] == 0 for p in group["params"]
        ]
        assert len(fast) == slow
        assert sum(len(group["params"]) for group in made) == len(list(model.parameters()))


def test_experts_run_by_grouped_products_and_by_the_plain_loop_agree(parts, book):
    models = parts["models"]
    model, _ = models.build(book, models.SHAPES["quick"], models.ARMS["memory"], seed=0)
    ids = torch.from_numpy(next(iter(parts["book"].batches(book, epoch=0, size=32, seed=0))))
    fast, _ = parts["learn"].answer_loss(model, ids)
    model.config._experts_implementation = "eager"
    plain, _ = parts["learn"].answer_loss(model, ids)
    assert float(fast.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)


# ---- a run -----------------------------------------------------------------------------------------------------------


def command(out, *more):
    return [sys.executable, str(HERE / "run.py"), "--out", str(out), "--quick", "--seeds", "0", *more]


@pytest.mark.slow
def test_a_quick_run_goes_on_where_it_was_stopped_and_gives_the_same_results(tmp_path):
    arms = ("--arms", "none", "memory")
    one = subprocess.run(
        command(tmp_path / "one", *arms), capture_output=True, text=True, timeout=900, check=False
    )
    assert one.returncode == 0, one.stderr[-2000:]

    results = tmp_path / "two" / "results"
    stopped = subprocess.Popen(command(tmp_path / "two", *arms), stderr=subprocess.DEVNULL)
    until = time.monotonic() + 600
    while not (results / "quick-none-0.json").exists() and time.monotonic() < until:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGKILL)
    stopped.wait(60)
    written = (results / "quick-none-0.json").read_bytes()
    assert not (results / "quick-surgery-memory-0.json").exists()
    two = subprocess.run(
        command(tmp_path / "two", *arms), capture_output=True, text=True, timeout=900, check=False
    )
    assert two.returncode == 0, two.stderr[-2000:]
    assert "quick-none-0:" not in two.stderr  # not trained again
    assert (results / "quick-none-0.json").read_bytes() == written

    def found(place, name):
        return json.loads((tmp_path / place / "results" / f"{name}.json").read_text(encoding="utf8"))

    for name in ("quick-none-0", "quick-memory-0"):
        for key in ("asked", "parameters", "bits_recalled", "bits_per_parameter"):
            assert found("one", name)[key] == found("two", name)[key]
        assert found("one", name)["training"]["loss"] == found("two", name)["training"]["loss"]
    surgery, again = found("one", "quick-surgery-memory-0"), found("two", "quick-surgery-memory-0")
    for key in ("necessity", "sufficiency", "transplant", "whole", "disk"):
        assert surgery[key] == again[key]
    assert surgery["undo"]["table_equal"]
    assert surgery["undo"]["logits_equal"]
    assert surgery["disk"]["logits_equal"]
    for scope in (*surgery["necessity"].values(), *surgery["sufficiency"].values()):
        assert scope["apart_operations_bit_equal"] == scope["apart_operations_compared"]
