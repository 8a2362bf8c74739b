"""The index against infini-gram 2.6.0 on the same tokens in one run: building, answers, latency, adding and deleting.

    python3 -m venv peer && peer/bin/pip install infini-gram==2.6.0 numpy
    export ENGRAM_INFINI_GRAM_PYTHON=peer/bin/python ENGRAM_INDEX_TEXT="train-00.jsonl.xz train-01.jsonl.xz"
    make bench-index
    python benchmarks/index.py --text a.jsonl.xz --held-out b.jsonl.xz --only build --out build.json

Text: .jsonl or .txt, also .xz; a line of JSON has "text", a .txt is one document. Its tokens are those of SmolLM2 (u16).
Questions are pieces of 1 to 64 tokens, half from the indexed text and half from held-out text (without any, from the
last hundredth, which is then not indexed). Without a peer its numbers are null.

build     each in processes of its own, in turns: wall time from start to a durable file, peak of proportional set size of
          the process tree sampled 50 times a second; infini-gram gets the tokens ready-made, as we do
answers   match length and count of every question, and all its continuations with their counts; where infini-gram sampled
          these (more than 1,000), 16 of them, counted by it one by one
latency   one call at a time, microseconds, wall time; p50, p90, p99. Prompts also in CPU time: they are long enough to be
          interrupted on a machine that has other work
store     add, delete and refresh of documents of 3,000 tokens in a directory; segments: 32 small ones against one

The last line is one JSON object, also written to benchmarks/results/index.json. Nothing fails when a limit is missed:
`wanted` says which were met.
"""

import argparse
import json
import lzma
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timing

timing.one_thread()
os.environ.pop("NUMBA_NUM_THREADS")

import numpy as np
from machine import circumstances
from watched import watched

from engram_lm.index import Document, Index, LiveSegment, Segment, Snapshot

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "index.json"
PEER_PYTHON, TEXT = "ENGRAM_INFINI_GRAM_PYTHON", "ENGRAM_INDEX_TEXT"
PARTS = ["build", "latency", "store", "segments"]
VOCAB = 49_152
MOST = 64  # tokens of a question
CHECKED = 16
SEPARATOR = 65_535  # infini-gram's
SEED = 0
MB = 2**20


# ---- tokens ---------------------------------------------------------------------------------------------------------------


def texts(path):
    """The documents of a file."""
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf8") as file:
        if Path(path.name.removesuffix(".xz")).suffix == ".txt":
            yield file.read()
        else:
            for line in file:
                yield json.loads(line)["text"]


def tokenizer_file():
    """SmolLM2's, from the cache that `--model smollm2` fills."""
    from engram_lm.bases import smollm2
    from engram_lm.cache import cache_directory

    path = cache_directory() / "bases" / smollm2.cache_name() / "tokenizer.json"
    if not path.exists():
        smollm2.load_smollm2(report=print)
    return path


def tokenized(paths, work, name, options):
    """(tokens u16 [T], starts [D + 1]) of these texts, from `work` where an earlier run left them there."""
    key = {"name": name, "files": [[str(path), path.stat().st_size] for path in paths]}
    made = work / f"{name}.json"
    if not made.exists() or json.loads(made.read_text()) != key:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(options.tokenizer or tokenizer_file()))
        parts, starts, batch = [], [0], []

        def flush():
            for one in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                parts.append(np.array(one.ids, np.uint16))
                starts.append(starts[-1] + len(one.ids))
            batch.clear()

        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        for path in paths:
            for text in texts(path):
                batch.append(text)
                if len(batch) == 512:
                    flush()
        flush()
        np.save(work / f"{name}.npy", np.concatenate(parts))
        np.save(work / f"{name}_starts.npy", np.array(starts))
        made.write_text(json.dumps(key))
    return np.load(work / f"{name}.npy", mmap_mode="r"), np.load(work / f"{name}_starts.npy")


def cut(tokens, starts, first, last, work, name):
    """Documents first .. last as files of their own."""
    np.save(work / f"{name}.npy", tokens[starts[first] : starts[last]])
    np.save(work / f"{name}_starts.npy", starts[first : last + 1] - starts[first])


def questions(indexed, held_out, n):
    """(token_QK int32 [n, MOST], length_Q): pieces of both texts in turn."""
    rng = np.random.default_rng(SEED)
    length_Q = rng.integers(1, MOST + 1, n)
    token_QK = np.zeros((n, MOST), np.int32)
    for q, size in enumerate(length_Q):
        source = (held_out, indexed)[q % 2]
        at = rng.integers(0, len(source) - MOST)
        token_QK[q, :size] = source[at : at + size]
    return token_QK, length_Q


# ---- building -------------------------------------------------------------------------------------------------------------


def build(work, options):
    """Both builders in turns; bytes a token of ours, u16 and u32."""
    token_file, starts_file = work / "indexed.npy", work / "indexed_starts.npy"
    tokens, starts = np.load(token_file, mmap_mode="r"), np.load(starts_file)
    arms = {"engram-lm": [], "infini-gram": []}
    ours = [sys.executable, str(HERE / "index_build.py"), str(token_file), str(starts_file)]
    for repeat in range(options.repeats + 1):
        done = watched([*ours, str(work / "ours.segment")])
        # the first run compiles
        if repeat:
            arms["engram-lm"].append(done)
        if options.peer and repeat:
            arms["infini-gram"].append(build_peer(tokens, starts, work, options))
    n = len(tokens) + len(starts) - 1
    found = {"tokens": n, "documents": len(starts) - 1, "text_bytes_u16": 2 * n}
    for name, runs in arms.items():
        if runs:
            found[name] = {
                "wall": timing.spread([run.wall_s for run in runs], "s"),
                "peak": timing.spread([run.peak_bytes / MB for run in runs], "MiB"),
                "peak_without_files": timing.spread([run.peak_own_bytes / MB for run in runs], "MiB"),
            }
    found["bytes_a_token_u16"] = (work / "ours.segment").stat().st_size / n
    watched([*ours, str(work / "wide.segment"), "70000"])
    found["bytes_a_token_u32"] = (work / "wide.segment").stat().st_size / n
    (work / "wide.segment").unlink()
    if options.peer:
        found["infini_gram_bytes_a_token"] = (
            sum((work / "peer" / name).stat().st_size for name in ("table.0", "tokenized.0", "offset.0")) / n
        )
    return found


def build_peer(tokens, starts, work, options):
    """infini-gram's own indexing of the same tokens, one separator before each document and one at the end."""
    directory = work / "peer"
    (directory / "data").mkdir(parents=True, exist_ok=True)
    if not (directory / "tokenized.0").exists():
        place_D = starts + np.arange(len(starts))
        stream = np.full(len(tokens) + len(starts), SEPARATOR, np.uint16)
        is_text = np.ones(len(stream), bool)
        is_text[place_D] = False
        stream[is_text] = tokens
        stream.tofile(directory / "tokenized.0")
        (place_D[:-1] * 2).astype(np.uint64).tofile(directory / "offset.0")
    (directory / "table.0").unlink(missing_ok=True)
    return watched(
        [
            options.peer, "-m", "infini_gram.indexing", "--data_dir", str(directory / "data"), "--save_dir", str(directory),
            "--token_dtype", "u16", "--cpus", str(os.cpu_count()), "--mem", str(options.peer_gib), "--ulimit", "1024",
        ]
    )  # fmt: skip


# ---- asking ---------------------------------------------------------------------------------------------------------------


def microseconds(call, arguments):
    """Of one call at a time, everything asked once before."""
    for one in arguments:
        call(one)
    spent = []
    for one in arguments:
        start = time.perf_counter_ns()
        call(one)
        spent.append((time.perf_counter_ns() - start) / 1e3)
    return percentiles(spent, "us")


def percentiles(values, unit):
    return {
        **{f"p{p}_{unit}": float(np.percentile(values, p)) for p in (50, 90, 99)},
        f"mean_{unit}": float(np.mean(values)), "calls": len(values),
    }  # fmt: skip


def latency(work, held_out, options):
    """Every question to both, and the differences between the answers."""
    given = np.load(work / "questions.npz")
    asked = [given["token_QK"][q, :n].astype(np.int64) for q, n in enumerate(given["length_Q"])]
    segment = Segment.open(work / "ours.segment", verify="all")
    snapshot = Snapshot([LiveSegment(segment)], vocab_size=VOCAB)
    found = {"questions": len(asked), "tokens": len(segment)}
    half = asked[: len(asked) // 2]
    out = np.empty(VOCAB + 1, np.float32)
    repeats = [
        {
            "longest_suffix": microseconds(snapshot.longest, half),
            "distribution": microseconds(lambda ids: snapshot.distribution(ids, out=out), half),
            "one_segment_longest_suffix": microseconds(lambda ids: longest(segment, ids), half),
        }
        for _ in range(options.repeats)
    ]
    found["engram-lm"] = {
        name: {**repeats[0][name], **timing.spread([one[name]["p50_us"] for one in repeats], "p50_us")}
        for name in repeats[0]
    }
    for name, source in (
        ("held-out", held_out),
        ("indexed", np.load(work / "indexed.npy", mmap_mode="r")),
    ):
        rng = np.random.default_rng(SEED)
        places = rng.integers(0, len(source) - 512, 40)
        prompts = [np.array(source[at : at + 512], np.int64) for at in places]
        spent = microseconds(snapshot.score, prompts)
        cpu = timing.alternate(
            {"score": lambda _, of=prompts: [snapshot.score(ids) for ids in of]},
            repeats=options.repeats,
            clock=time.thread_time,
        )["score"]
        found["engram-lm"][f"score, {name}"] = {
            "p50_us_a_position": spent["p50_us"] / 512,
            "p99_us_a_position": spent["p99_us"] / 512,
            "cpu": timing.spread([s * 1e6 / 512 / len(prompts) for s in cpu], "us_a_position"),
            "prompts": len(prompts),
            "tokens": 512,
        }
    found["infini-gram"] = found["differences"] = None
    if options.peer:
        answers, asking = work / "answers.npz", work / "asking.npz"
        check_QC = to_check(snapshot, asked)
        np.savez(asking, token_QK=given["token_QK"], length_Q=given["length_Q"], check_QC=check_QC)
        done = subprocess.run(
            [
                options.peer,
                str(HERE / "peer_infini_gram.py"),
                str(work / "peer"),
                str(asking),
                str(answers),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{PEER_PYTHON}={options.peer}: asking failed.\n{done.stderr[-2000:]}")
        found["infini-gram"] = json.loads(done.stdout.splitlines()[-1])
        found["differences"], found["questions_it_sampled"] = differences(
            snapshot, asked, check_QC, np.load(answers)
        )
    return found


def longest(segment, ids):
    """The plain way through one segment."""
    match = segment.match(ids)
    return segment.continuations(match, match.depth)


def to_check(snapshot, asked):
    """Up to CHECKED continuations of each question, some of the most frequent and some others; -1 fills up."""
    check_QC = np.full((len(asked), CHECKED), -1, np.int32)
    for q, ids in enumerate(asked):
        _, token_I, count_I = snapshot.longest(ids)
        token_I, count_I = token_I[token_I < VOCAB], count_I[token_I < VOCAB]
        by = np.argsort(-count_I, kind="stable")
        by = np.concatenate([by[: CHECKED // 2], by[CHECKED // 2 :: max(1, 2 * len(by) // CHECKED)]])[
            :CHECKED
        ]
        check_QC[q, : len(by)] = token_I[by]
    return check_QC


def differences(snapshot, asked, check_QC, theirs):
    """How many questions have another match length, count, continuations (of those it did not sample), or checked count."""
    found = {"match_length": 0, "count": 0, "continuations": 0, "checked_counts": 0}
    start, token, count = theirs["start"], theirs["token"], theirs["count"]
    for q, ids in enumerate(asked):
        order, token_I, count_I = snapshot.longest(ids)
        found["match_length"] += int(order != theirs["length"][q])
        # its file has a separator before the first document as well, which follows nothing
        total = theirs["total"][q] - (theirs["length"][q] == 0)
        found["count"] += int(count_I.sum() != total)
        part = slice(start[q], start[q + 1])
        same = np.array_equal(token_I, token[part]) and np.array_equal(count_I, count[part])
        found["continuations"] += int(not same and not theirs["sampled"][q])
        check = check_QC[q][check_QC[q] >= 0]
        ours = count_I[np.searchsorted(token_I, check)]
        found["checked_counts"] += int(not np.array_equal(ours, theirs["checked"][q][: len(check)]))
    return found, int(theirs["sampled"].sum())


# ---- changing -------------------------------------------------------------------------------------------------------------


def store(work, options):
    """Documents of 3,000 tokens added to and deleted from an index of a million, one at a time."""
    source = np.load(work / "indexed.npy", mmap_mode="r")
    pieces = [np.array(source[i * 3000 : (i + 1) * 3000], np.int64) for i in range(350 + options.updates)]
    spent = {"add": [], "visible": [], "delete": [], "gone": []}
    with (
        tempfile.TemporaryDirectory(dir=work) as directory,
        Index.create(Path(directory) / "index", vocab_size=VOCAB) as writer,
    ):
        writer.add([(f"base {i}", piece) for i, piece in enumerate(pieces[:350])])
        with Index.open(Path(directory) / "index") as reader:
            for turn in range(-5, options.updates):
                # 5 turns to warm up
                piece = pieces[350 + turn % options.updates]
                name, start = f"new {turn}", time.perf_counter()
                writer.add([(name, piece)])
                added = time.perf_counter()
                reader.refresh()
                reader.snapshot().longest(piece[:64])
                seen = time.perf_counter()
                victim = name if turn % 2 else f"base {turn % 350}"
                deleting = time.perf_counter()
                if turn >= 0 or turn % 2:
                    writer.delete([victim])
                deleted = time.perf_counter()
                reader.refresh()
                reader.snapshot().longest(piece[:64])
                gone = time.perf_counter()
                if turn >= 0:
                    for what, seconds in (
                        ("add", added - start), ("visible", seen - added), ("delete", deleted - deleting),
                        ("gone", gone - deleted),
                    ):  # fmt: skip
                        spent[what].append(seconds * 1e3)
        stats = writer.stats()
    return {
        "document_tokens": 3000,
        "tokens": stats.tokens,
        "segments": stats.segments,
        **{what: percentiles(values, "ms") for what, values in spent.items()},
    }


def segments(work, options):
    """The same documents in 32 segments of 30,000 tokens and in one: latency of both, in turns."""
    source = np.load(work / "indexed.npy", mmap_mode="r")
    size = min(30_000, len(source) // 32)
    lists = [np.array(source[i * size : (i + 1) * size], np.int64) for i in range(32)]
    facts = [Document(id=str(i)) for i in range(32)]
    one = Segment.build(lists, vocab_size=VOCAB, documents=facts)
    many = [
        Segment.build([tokens], vocab_size=VOCAB, documents=[fact])
        for tokens, fact in zip(lists, facts, strict=True)
    ]
    arms = {
        "one": Snapshot([LiveSegment(one)], vocab_size=VOCAB),
        "32": Snapshot([LiveSegment(s) for s in many], vocab_size=VOCAB),
    }
    given = np.load(work / "questions.npz")
    asked = [given["token_QK"][q, :n].astype(np.int64) for q, n in enumerate(given["length_Q"][:1000])]
    for ids in asked[:200]:
        first, second = arms["one"].longest(ids), arms["32"].longest(ids)
        assert first[0] == second[0]
        assert np.array_equal(first[2], second[2])
    out = np.empty(VOCAB + 1, np.float32)
    found = {"tokens": len(one)}
    for what in ("longest", "distribution"):
        p50 = {name: [] for name in arms}
        for _ in range(options.repeats):
            for name, snapshot in arms.items():
                if what == "longest":
                    call = snapshot.longest
                else:
                    call = lambda ids, to=snapshot: to.distribution(ids, out=out)  # noqa: E731
                p50[name].append(microseconds(call, asked)["p50_us"])
        found[what] = {name: timing.spread(values, "p50_us") for name, values in p50.items()}
        found[what]["32 over one"] = timing.ratio(p50, "32", "one")
    return found


# ---- limits ---------------------------------------------------------------------------------------------------------------


def wanted(found):
    """Every limit with what was measured: {what, limit, at (least or most), value, met}; null without a peer."""
    rows = []

    def row(what, limit, at, value):
        met = None if value is None else bool(value <= limit if at == "most" else value >= limit)
        rows.append({"what": what, "limit": limit, "at": at, "value": value, "met": met})

    built, asked = found.get("build"), found.get("latency")
    if built:
        peer = built.get("infini-gram")
        ours = built["engram-lm"]
        row(
            "build time over infini-gram's",
            1.0,
            "most",
            peer and ours["wall"]["median_s"] / peer["wall"]["median_s"],
        )
        row(
            "build memory over infini-gram's",
            0.6,
            "most",
            peer and ours["peak"]["median_MiB"] / peer["peak"]["median_MiB"],
        )
        row("bytes a token, u16", 8.6, "most", built["bytes_a_token_u16"])
        row("bytes a token, u32", 13.0, "most", built["bytes_a_token_u32"])
    if asked:
        ours, peer = asked["engram-lm"], asked["infini-gram"]
        row("longest suffix, p50, us a call", 40.0, "most", ours["longest_suffix"]["median_p50_us"])
        best = peer and min(one["longest_suffix"]["p50_us"] for one in peer["settings"].values())
        row(
            "infini-gram's best p50 over ours",
            10.0,
            "least",
            peer and best / ours["longest_suffix"]["median_p50_us"],
        )
        for name in ("held-out", "indexed"):
            row(
                f"score of a prompt, {name}, us a position",
                10.0,
                "most",
                ours[f"score, {name}"]["p50_us_a_position"],
            )
        row(
            "questions answered otherwise than infini-gram",
            0,
            "most",
            peer and sum(asked["differences"].values()),
        )
    if "store" in found:
        row("add of 3,000 tokens, p50, ms", 5.0, "most", found["store"]["add"]["p50_ms"])
        row("visible to an open reader, p50, ms", 10.0, "most", found["store"]["visible"]["p50_ms"])
        row("delete, p50, ms", 100.0, "most", found["store"]["delete"]["p50_ms"])
    if "segments" in found:
        row("32 segments over one", 3.0, "most", found["segments"]["longest"]["32 over one"]["median_ratio"])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[Path(p) for p in os.environ.get(TEXT, "").split()]
    )
    parser.add_argument("--held-out", type=Path, nargs="+", default=[], help="text that is not indexed")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json with ids below 49,152; SmolLM2's by default"
    )
    parser.add_argument(
        "--work", type=Path, help="where tokens and indexes are kept; a temporary folder by default"
    )
    parser.add_argument(
        "--peer", default=os.environ.get(PEER_PYTHON), help="a Python that has infini-gram 2.6.0"
    )
    parser.add_argument("--peer-gib", type=int, default=4, help="what its indexing is told it may use")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--questions", type=int, default=5000)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    options = parser.parse_args()
    if not options.text:
        parser.error(
            f"name a text with --text or in {TEXT}: .jsonl or .txt, also .xz; 150 MB are 34 M tokens"
        )
    with tempfile.TemporaryDirectory(prefix="engram-index-") as temporary:
        # infini-gram replaces "tokenized" by "table" anywhere in its paths
        work = (options.work or Path(temporary)).resolve()
        if "tokenized" in str(work) or "table" in str(work):
            parser.error(
                'infini-gram cannot work in a path that holds "table" or "tokenized"; choose another --work'
            )
        work.mkdir(parents=True, exist_ok=True)
        found = run(work, options)
    text = json.dumps(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n", encoding="utf8")
    print(text)


def run(work, options):
    started = time.time()
    found = {"benchmark": "index", **circumstances("engram-lm", "numpy", "numba"), "seed": SEED}
    found["peer"] = "infini-gram 2.6.0" if options.peer else None
    tokens, starts = tokenized(options.text, work, "text", options)
    if options.held_out:
        held_out, _ = tokenized(options.held_out, work, "held_out", options)
        n_indexed = len(starts) - 1
    else:
        n_indexed = int(np.searchsorted(starts, starts[-1] * 0.99))
        held_out = tokens[starts[n_indexed] :]
    cut(tokens, starts, 0, n_indexed, work, "indexed")
    token_QK, length_Q = questions(tokens[: starts[n_indexed]], held_out, options.questions)
    np.savez(work / "questions.npz", token_QK=token_QK, length_Q=length_Q)
    found["text"] = {"files": [path.name for path in options.text], "held_out": [p.name for p in options.held_out],
                     "documents": n_indexed, "tokens": int(starts[n_indexed]), "tokenizer": "SmolLM2, 49,152"}  # fmt: skip
    for part in options.only:
        arguments = (work, held_out, options) if part == "latency" else (work, options)
        found[part] = {"build": build, "latency": latency, "store": store, "segments": segments}[part](
            *arguments
        )
        print(f"{part}: {json.dumps(found[part])}", flush=True)
    found["wanted"] = wanted(found)
    for row in found["wanted"]:
        value = "not measured" if row["value"] is None else f"{row['value']:.3f}"
        verdict = {None: "", True: "met", False: "MISSED"}[row["met"]]
        print(f"  {row['what']:52}{value:>14}  at {row['at']} {row['limit']}  {verdict}")
    found |= {"load_average_end": os.getloadavg()[0], "wall_s": time.time() - started}
    return found


if __name__ == "__main__":
    main()
