"""The cache simulator: kernels against plain twins, the order of serving by hand, the command as a user meets it."""

import itertools
import json
from collections import Counter, OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_lm import cli
from engram_lm.addressing import PROFILES, resolve
from engram_lm.cachesim import kernels
from engram_lm.cachesim.report import parse_bytes
from engram_lm.cachesim.requests import Requests, read_requests
from engram_lm.cachesim.simulate import simulate
from engram_lm.errors import ConfigError, DataError

READS = st.lists(st.integers(0, 12), min_size=1, max_size=300)


def lru_plain(entries: list[int], capacity: int, first: int = 0) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for i, entry in enumerate(entries):
        if entry in held:
            hits += i >= first
            held.move_to_end(entry)
        else:
            if len(held) == capacity:
                held.popitem(last=False)
            held[entry] = None
    return hits


def lfu_plain(entries: list[int], capacity: int, first: int = 0) -> int:
    # entry -> (key, time of the last read, count while held)
    held: dict[int, tuple[int, int, int]] = {}
    hits = age = 0
    for i, entry in enumerate(entries):
        count = 0
        if entry in held:
            hits += i >= first
            count = held[entry][2]
        elif len(held) == capacity:
            victim = min(held, key=held.__getitem__)
            age = held.pop(victim)[0]
        held[entry] = (count + 1 + age, i, count + 1)
    return hits


def tinylfu_plain(entries: list[int], capacity: int, first: int = 0) -> int:
    counts: Counter[int] = Counter()
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for i, entry in enumerate(entries):
        if i and i % (kernels.TINYLFU_PERIOD * capacity) == 0:
            counts = Counter({key: value // 2 for key, value in counts.items()})
        counts[entry] += 1
        if entry in held:
            hits += i >= first
            held.move_to_end(entry)
        elif len(held) < capacity:
            held[entry] = None
        elif counts[entry] > counts[next(iter(held))]:
            held.popitem(last=False)
            held[entry] = None
    return hits


def distances(entries: list[int]) -> np.ndarray:
    found = np.empty(len(entries), dtype=np.int32)
    kernels.lru_distances(np.array(entries, dtype=np.int32), max(entries) + 1, found)
    return found


@given(READS)
def test_reuse_distances_give_the_hits_of_every_lru_cache(entries):
    found = distances(entries)
    for capacity in range(1, 15):
        assert ((found >= 0) & (found < capacity)).sum() == lru_plain(entries, capacity)


def test_reuse_distances_of_a_long_stream():
    # many words of 64 reads, entries that return after thousands of others
    entries = (np.random.default_rng(0).zipf(1.2, 20_000) % 3_000).tolist()
    found = distances(entries)
    for capacity in (1, 10, 300, 2_000, 3_000):
        assert ((found >= 0) & (found < capacity)).sum() == lru_plain(entries, capacity)


@given(READS, st.integers(1, 14), st.integers(0, 50))
def test_frequency_policies_equal_their_plain_twins(entries, capacity, first):
    array = np.array(entries, dtype=np.int32)
    assert kernels.lfu_hits(array, 13, capacity, first) == lfu_plain(entries, capacity, first)
    assert kernels.tinylfu_hits(array, 13, capacity, first) == tinylfu_plain(entries, capacity, first)


def test_frequency_policies_equal_their_plain_twins_over_many_halvings():
    entries = (np.random.default_rng(1).zipf(1.3, 30_000) % 500).tolist()
    array = np.array(entries, dtype=np.int32)
    for capacity in (1, 7, 60, 400):
        assert kernels.lfu_hits(array, 500, capacity, 1_000) == lfu_plain(entries, capacity, 1_000)
        assert kernels.tinylfu_hits(array, 500, capacity, 1_000) == tinylfu_plain(entries, capacity, 1_000)


def test_the_twins_are_three_different_policies():
    entries = (np.random.default_rng(1).zipf(1.3, 5_000) % 500).tolist()
    assert len({plain(entries, 40) for plain in (lru_plain, lfu_plain, tinylfu_plain)}) == 3


def served(lengths: list[int], prompts: list[int], slots: int) -> list[list[int]]:
    """Tokens of each step, by their place in the file."""
    token_T = np.full(sum(lengths), -1, dtype=np.int64)
    step_T = np.full(sum(lengths), -1, dtype=np.int32)
    steps, _ = kernels.serve(np.array(lengths), np.array(prompts), slots, token_T, step_T)
    return [token_T[step_T == step].tolist() for step in range(steps)]


def test_requests_are_read_round_robin_and_a_free_slot_takes_the_next():
    # places: request 0 is 0 1 2, request 1 is 3, request 2 is 4 5, request 3 is 6 7
    assert served([3, 1, 2, 2], [0, 0, 0, 0], 2) == [[0, 3], [1, 4], [2, 5], [6], [7]]
    assert served([3, 1, 2, 2], [0, 0, 0, 0], 1) == [[t] for t in range(8)]
    assert served([3, 1, 2, 2], [0, 0, 0, 0], 4) == [[0, 3, 4, 6], [1, 5, 7], [2]]


def test_steps_in_which_a_slot_finds_no_request_are_left_out():
    lengths, space = np.array([3, 1, 2, 2]), (np.zeros(8, dtype=np.int64), np.zeros(8, dtype=np.int32))
    assert kernels.serve(lengths, np.zeros(4, dtype=np.int64), 2, *space) == (5, 3)
    assert kernels.serve(lengths, np.zeros(4, dtype=np.int64), 1, *space) == (8, 8)
    found = simulate(
        requests_of([5, 6, 7], [5], [6, 7], [8, 9]), scheme_of(), bytes_per_row=264, slots=2, warm_up=0.5
    )
    # 0 3 | 1 4 | 2 5 are played, and the step of the fourth of six tokens is the first that counts
    assert (found.tokens, found.left_out, found.steps, found.counted_steps) == (6, 2, 3, 2)
    assert found.lookups == 4 * 24


def test_a_prompt_is_read_in_one_step():
    assert served([4, 3], [2, 9], 1) == [[0, 1], [2], [3], [4, 5, 6]]
    assert served([4, 3], [3, 1], 2) == [[0, 1, 2, 4], [3, 5], [6]]


def requests_of(*ids: list[int], prompt: int = 0) -> Requests:
    return Requests(
        name="here",
        ids_T=np.array([token for request in ids for token in request], dtype=np.int64),
        tokens_Q=np.array([len(request) for request in ids]),
        prompt_Q=np.full(len(ids), prompt),
    )


def scheme_of(rows_per_head: int = 20_011, vocab_size: int = 1_000, name: str = "deepseek-v4.1"):
    return resolve(
        PROFILES[name], vocab_size=vocab_size, layers=(1,), fill_id=2, rows_per_head=rows_per_head
    )[0]


def test_rows_asked_twice_in_a_step_are_read_once():
    # the second request asks in every step for what the first one asks
    found = simulate(
        requests_of([5, 6, 7], [5, 6, 7]), scheme_of(), bytes_per_row=264, slots=2, budgets=[10**6]
    )
    shared = found.caches["all"]
    assert (found.steps, found.lookups, shared.reads) == (3, 2 * 3 * 24, 3 * 24)
    assert found.merged == 0.5
    assert shared.at[10**6].lru == 0.0
    assert shared.limit == 0.0


def test_a_request_that_comes_again_hits_everything_and_warm_up_leaves_the_rest_out():
    ids = [5, 6, 7, 8]
    found = simulate(
        requests_of(ids, ids), scheme_of(), bytes_per_row=264, slots=1, budgets=[264 * 96], warm_up=0.5
    )
    shared = found.caches["all"]
    assert shared.reads == 4 * 24
    assert shared.entries == 4 * 24
    assert (shared.limit, shared.at[264 * 96].lru, shared.at[264 * 96].whole_steps) == (1.0, 1.0, 1.0)
    assert shared.at[264 * 96].lru_by_order == {"2-gram": 1.0, "3-gram": 1.0, "4-gram": 1.0}
    # every row comes back after 95 others: one entry less holds nothing
    less = simulate(
        requests_of(ids, ids), scheme_of(), bytes_per_row=264, slots=1, budgets=[264 * 95], warm_up=0.5
    )
    assert less.caches["all"].at[264 * 95].lru == 0.0
    assert shared.needed[0.5] == 264 * 96
    assert shared.needed_static[0.5] == 264 * 48


@pytest.fixture(scope="module")
def zipf_requests() -> Requests:
    ids = np.random.default_rng(3).zipf(1.4, 900) % 200
    return requests_of(*(part.tolist() for part in np.split(ids, 30)), prompt=7)


def naive_reads(requests: Requests, scheme, slots: int) -> tuple[list[int], list[int]]:
    """Every step's different rows in order of appearance, and the order of n-grams each belongs to."""
    rows = [
        scheme.addresses(ids).tolist() for ids in np.split(requests.ids_T, np.cumsum(requests.tokens_Q)[:-1])
    ]
    flat = [row for request in rows for row in request]
    request_T = np.repeat(np.arange(len(requests)), requests.tokens_Q)
    reads, orders = [], []
    for step in served(requests.tokens_Q.tolist(), requests.prompt_Q.tolist(), slots):
        if len(set(request_T[step].tolist())) < slots:
            break
        seen = dict.fromkeys((row, column // 8) for token in step for column, row in enumerate(flat[token]))
        reads += [row for row, _ in seen]
        orders += [order for _, order in seen]
    return reads, orders


@pytest.mark.parametrize("slots", [1, 4])
def test_the_simulation_equals_caches_of_rows_kept_by_hand(zipf_requests, slots):
    # few rows a head, so that n-grams share rows
    scheme, sizes = scheme_of(rows_per_head=8_209), (264 * 50, 264 * 300)
    reads, orders = naive_reads(zipf_requests, scheme, slots)
    found = simulate(zipf_requests, scheme, bytes_per_row=264, slots=slots, budgets=sizes)
    shared = found.caches["all"]
    assert (shared.reads, shared.entries) == (len(reads), len(set(reads)))
    assert shared.first_reads == len(set(reads))
    for size in sizes:
        point, capacity = shared.at[size], size // 264
        for name, plain in (("lru", lru_plain), ("lfu", lfu_plain), ("tinylfu", tinylfu_plain)):
            assert getattr(point, name) == pytest.approx(plain(reads, capacity) / len(reads), abs=1e-12)
        hottest = sum(count for _, count in Counter(reads).most_common(capacity))
        assert point.static == pytest.approx(hottest / len(reads), abs=1e-12)
        threes = [row for row, order in zip(reads, orders, strict=True) if order == 1]
        alone = found.caches["3-gram"].at[size]
        assert alone.lru == pytest.approx(lru_plain(threes, capacity) / len(threes), abs=1e-12)


def test_no_static_cache_beats_hindsight_and_no_cache_the_limit(zipf_requests):
    found = simulate(
        zipf_requests,
        scheme_of(),
        bytes_per_row=264,
        slots=2,
        budgets=[264 * 200],
        warm_up=0.3,
        policies=("lfu", "tinylfu", "pinned"),
    )
    for cache in found.caches.values():
        curve = cache.curve
        assert [point.entries for point in curve] == sorted({point.entries for point in curve})
        assert all(a.lru <= b.lru and a.static <= b.static for a, b in itertools.pairwise(curve))
        assert all(point.pinned <= point.static + 1e-12 for point in curve)
        assert curve[-1].lru == pytest.approx(cache.limit, abs=1e-12)
        assert max(cache.at[264 * 200].lfu, cache.at[264 * 200].tinylfu) <= cache.limit


def test_a_cache_of_ngrams_counts_ngrams(zipf_requests):
    # modulo 11 almost all n-grams share rows, as n-grams they do not
    scheme = scheme_of(rows_per_head=1_021)
    found = simulate(zipf_requests, scheme, bytes_per_row=264, budgets=[264 * 8], entry="ngram")
    ids = [part.tolist() for part in np.split(zipf_requests.ids_T, 30)]
    for order in (2, 3, 4):
        # 2 fills the places before the start
        filled = [[2] * (order - 1) + part for part in ids]
        ngrams = {tuple(part[t : t + order]) for part in filled for t in range(len(part) - order + 1)}
        assert found.caches[f"{order}-gram"].entries == len(ngrams)
    assert found.caches["2-gram"].bytes_per_entry == 264 * 8
    assert found.caches["all"].at[264 * 8].entries == 1


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<pad>", "one", "One", "two", "three", "four"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def test_the_same_requests_out_of_every_kind_of_file(tmp_path):
    stream = np.array([5, 6, 0, 7, 0, 8], dtype=np.uint16)
    np.save(tmp_path / "a.npy", stream)
    stream.tofile(tmp_path / "a.bin")
    (tmp_path / "a.jsonl").write_text('{"ids": [5, 6, 0]}\n\n{"ids": [7, 0]}\n{"ids": []}\n{"ids": [8]}\n')
    found = [
        read_requests(tmp_path / "a.npy", separator=0),
        read_requests(tmp_path / "a.bin", separator=0, dtype="uint16"),
        read_requests(tmp_path / "a.jsonl"),
    ]
    for requests in found:
        assert requests.ids_T.tolist() == stream.tolist()
        assert requests.tokens_Q.tolist() == [3, 2, 1]
        assert requests.starts_T.tolist() == [True, False, False, True, False, True]
    assert [requests.empty for requests in found] == [0, 0, 1]


def test_prompts_limits_rows_and_other_orders(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"ids": [5, 6, 0], "prompt_tokens": 2}\n{"ids": [7, 0]}\n')
    assert read_requests(tmp_path / "a.jsonl").prompt_Q.tolist() == [2, 0]
    assert read_requests(tmp_path / "a.jsonl", limit=3).tokens_Q.tolist() == [3]
    assert read_requests(tmp_path / "a.jsonl", limit=4).tokens_Q.tolist() == [3, 2]
    np.save(tmp_path / "rows.npy", np.arange(40).reshape(10, 4))
    rows = read_requests(tmp_path / "rows.npy", prefill=3)
    assert rows.prompt_Q.tolist() == [3] * 10
    mixed = rows.shuffled(0)
    assert mixed.ids_T.tolist() != rows.ids_T.tolist()
    assert sorted(map(tuple, mixed.ids_T.reshape(10, 4))) == [tuple(range(i, i + 4)) for i in range(0, 40, 4)]


def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).zipf(1.5, 400) % 90)
    command = ["table", "simulate", "--tokens", str(tmp_path / "ids.npy"), "--separator", "1"]
    command += ["--profile", "deepseek-v4.1", "--canonical", "--concurrency", "1,4", "--layer", "14"]
    picture = tmp_path / "curves.png"
    assert cli.run([*command, "--budget", "10KB,1MB", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ids.npy: 400 tokens in ")
    assert "384,016,682 rows of 264 bytes (fp8_e4m3_e8m0)" in printed
    assert printed.count("layer 14, ") == 2
    assert printed.count("  10 KB   0.0000%") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_json(tmp_path, capsys, tokenizer_file):
    (tmp_path / "a.txt").write_text("one two three one two\nOne two four\n")
    command = ["table", "simulate", "--tokens", str(tmp_path / "a.txt"), "--txt-documents", "line", "--json"]
    command += [
        "--tokenizer",
        tokenizer_file,
        "--profile",
        "deepseek-v4.1",
        "--layer",
        "1",
        "--budget",
        "1MB",
    ]
    assert cli.run([*command, "--rows-per-head", "100003"]) == 0
    told = json.loads(capsys.readouterr().out)
    # one and One are one canonical id
    assert (told["tokens"], told["requests"], told["vocab_size"]) == (8, 2, 5)
    shared = told["simulations"][0]["caches"]["all"]
    # tokens 3 and 5 repeat an n-gram: "two" after "one" twice, and the start "one" once
    repeated = {"2-gram": 3, "3-gram": 2, "4-gram": 2}
    for name, times in repeated.items():
        assert shared["at"][0]["lru_by_order"][name] == pytest.approx(times / 8)
    assert shared["at"][0]["budget"] == 10**6
    assert "pinned" not in shared["at"][0]


@pytest.fixture
def id_file(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(50))
    (tmp_path / "ids.bin").write_bytes(b"abc")
    (tmp_path / "float.npy").write_bytes(b"\x93NUMPY nonsense")
    np.save(tmp_path / "real.npy", np.zeros(3))
    (tmp_path / "log.jsonl").write_text('{"ids": [1, 2.5]}\n')
    (tmp_path / "broken.jsonl").write_text('{"ids": [1]}\n{"ids": \n')
    (tmp_path / "text.txt").write_text("one two")
    (tmp_path / "a.csv").write_text("1,2")
    (tmp_path / "empty.jsonl").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("tokens", "options", "told"),
    [
        ("none.npy", [], "no such file"),
        ("a.csv", [], "ids are read from"),
        ("float.npy", [], "cannot be read as .npy"),
        ("real.npy", [], "float64"),
        ("ids.bin", [], "--dtype"),
        ("ids.bin", ["--dtype", "uint16"], "3 bytes"),
        ("ids.npy", ["--dtype", "uint16"], "--dtype has no effect"),
        ("ids.npy", ["--separator", "77"], "separator 77 is nowhere"),
        ("ids.npy", ["--concurrency", "2"], "2 requests at a time, of 1"),
        ("ids.npy", ["--concurrency", "0"], "--concurrency is '0'"),
        ("ids.npy", ["--budget", "12 apples"], "'12 apples'"),
        ("ids.npy", ["--budget", "100B"], "100 bytes holds no entry of 264 bytes"),
        ("ids.npy", ["--policy", "lru,mru"], "'mru'"),
        ("ids.npy", ["--policy", "pinned"], "--warm-up"),
        ("ids.npy", ["--warm-up", "1"], "warm_up is 1.0"),
        ("ids.npy", ["--vocab-size", "40"], "id 40 in request 0"),
        ("ids.npy", ["--layer", "3"], "layers 1, 14 do"),
        ("ids.npy", ["--prefill", "0"], "prefill is 0"),
        ("ids.npy", ["--codec", "int3"], "'int3'"),
        ("ids.npy", ["--plot", "curve.svg"], ".png"),
        ("log.jsonl", [], "log.jsonl:1: wanted"),
        ("broken.jsonl", [], "broken.jsonl:2: broken JSON"),
        ("empty.jsonl", [], "empty"),
        ("text.txt", [], "--tokenizer"),
    ],
)
def test_bad_input_is_one_line(id_file, tokens, options, told, capsys):
    command = ["table", "simulate", "--tokens", str(id_file / tokens), "--profile", "deepseek-v4.1"]
    assert cli.run([*command, "--canonical", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("engram-lm: ")
    assert captured.err.count("\n") == 1
    assert told in captured.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--profile", "deepseek-v4.1"], "canonical"),
        (["--profile", "qwen-ple", "--canonical", "--eos-ids", "1"], "--canonical has no effect"),
        (["--profile", "qwen-ple"], "eos_ids"),
        (["--profile", "nobody"], "'nobody'"),
        (["--profile", "qwen-ple", "--eos-ids", "1", "--tokenizer", "none.json"], "none.json"),
    ],
)
def test_ids_of_the_wrong_kind_are_refused(id_file, options, told, capsys):
    assert cli.run(["table", "simulate", "--tokens", str(id_file / "ids.npy"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("engram-lm: ")
    assert told in error


def test_a_log_with_prompts_takes_no_prefill(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"ids": [5, 6, 0], "prompt_tokens": 2}\n')
    with pytest.raises(ConfigError, match="--prefill has no effect"):
        read_requests(tmp_path / "a.jsonl", prefill=2)
    (tmp_path / "b.jsonl").write_text('{"ids": [5, 6, 0], "prompt_tokens": 4}\n')
    with pytest.raises(DataError, match="prompt_tokens is 4"):
        read_requests(tmp_path / "b.jsonl")


def test_sizes_are_read_as_they_are_written():
    sizes = ["2000", "64MB", "1.5 GiB", "0.1%", "3kb"]
    assert [parse_bytes(size, table_bytes=10**9) for size in sizes] == [
        2000,
        64 * 10**6,
        3 * 2**29,
        10**6,
        3000,
    ]
