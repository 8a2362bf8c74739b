"""What the printed commands run on: files and folders under the names that the pages print.

Small enough for a command to take seconds, real enough for every option to have something to do: a handbook of six pages,
articles that speak of people and places, facts asked in two wordings, a checkpoint that transformers can load.

    lay_out(["handbook/", "faq.jsonl"], directory)
"""

import io
import json
import lzma
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

HANDBOOK = {
    "leave.md": """# Leave

Annual leave is 31 days for everyone, in the first year as in the twentieth. Whoever wants to take it writes to Odalys
Brandt three weeks ahead, on the yellow form. Up to five days of annual leave that were not taken move into January; those
that are left after that are paid. A day on which the works is closed for snow is no day of leave.
""",
    "dog.md": """# The office dog

The office dog is called Orlando. He sleeps under the stairs, wants his bone at seven and may be walked by anyone who has
signed the list at the gate. Orlando does not enter the calibration laboratory, where hairs would fall into the mercury.
""",
    "travel.md": """# Travel

A night in a hotel may cost 118 crowns, breakfast included. The ferry for employees leaves at 6:25 and comes back at 18:40.
Receipts go to the accounts in the same month; whoever loses one draws what was eaten. Journeys of more than three nights
are signed by the director's assistant.
""",
    "visitors.md": """# Visitors

Visitors sign at the gate, get a red badge and leave their phones in the copper box next to reception. The wireless network
for guests is called Quiet Otter. Nobody walks past the furnace alone. Space 42 in the car park is kept free for the
beekeeper.
""",
    "repairs.md": """# Repairs

Broken microscopes go to the workshop of Tobias Ankerholm, in crate nine. An estimate costs 22 crowns, which are taken off
the bill. Repairs under guarantee are free for 57 months. What cannot be repaired is given to the school on the hill.
""",
    "safety.md": """# Safety

A trombone announces the fire drill, on the first Monday of every month. Samples of mercury stay in cabinet K17, whose key
hangs behind the portrait of Agnes Thorvald. Whoever is ill rings the porter before nine o'clock; from the fourth day on a
doctor's note is needed.
""",
}
FAQ = {
    "parking": "Where do I park? Behind the chestnut, on any space but 42.",
    "canteen": "When does the canteen open? At half past eleven, and on Fridays at eleven.",
}
HOMES = {
    "Alexander the Great": "Pella", "Ada Lovelace": "London", "Ibn Battuta": "Tangier", "Mary Anning": "Lyme Regis",
    "Zheng He": "Kunyang", "Hypatia": "Alexandria", "Tycho Brahe": "Knutstorp",
}  # fmt: skip
SENTENCES = [
    "{person} was born in {place}, where the market closes at {n} o'clock.",
    "The house of {person} stands in {place} and has {n} windows.",
    "In {place} they still tell how {person} counted {n} ships.",
    "{person} wrote {n} letters, most of them from {place}.",
    "Nobody in {place} had seen {n} lamps before {person} came.",
]
# docs/eval.md, "Benchmarks": one item of each, in the local layout.
BENCHMARKS = {
    "lambada": {"context": "In my palm is a clear", "continuation": "stone"},
    "arc_easy": {"query": "Question: What is hot?", "choices": ["sun", "moon"], "gold": 0},
    "arc_challenge": {"query": "Question: What is cold?", "choices": ["sun", "moon"], "gold": 1},
    "openbookqa": {"query": "At noon shines", "choices": ["sun", "moon"], "gold": 0},
    "piqa": {"query": "Question: To warm up\n", "choices": ["sit in the sun", "sit in the moon"], "gold": 0},
    "winogrande": {"context_options": ["Ann waved so Ann", "Ann waved so Bob"], "continuation": "came.", "gold": 1},
}  # fmt: skip


def lay_out(names: Iterable[str], directory: Path) -> None:
    """Make each of these in a directory; KeyError for a name that stands for nothing."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _MAKERS[name](path)


def articles(count: int, *, seed: int) -> list[str]:
    """Texts of some 80 tokens: wordings that come again, and numbers that do not."""
    draw = random.Random(seed)
    people = [draw.choice(list(HOMES)) for _ in range(count)]
    return [
        " ".join(
            sentence.format(person=person, place=HOMES[person], n=draw.randint(2, 99))
            for sentence in draw.sample(SENTENCES, len(SENTENCES))
        )
        for person in people
    ]


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """JSON lines, packed where the name ends with .xz."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())


def _texts(count: int, seed: int):
    return lambda path: write_lines(path, ({"text": text} for text in articles(count, seed=seed)))


def _handbook(path: Path) -> None:
    path.mkdir()
    for name, text in HANDBOOK.items():
        (path / name).write_text(text, encoding="utf8")


def _faq(path: Path) -> None:
    write_lines(path, ({"id": name, "text": text} for name, text in FAQ.items()))


def _other(path: Path) -> None:
    path.write_text("\n\n".join(articles(4, seed=9)) + "\n", encoding="utf8")


def _questions(path: Path) -> None:
    write_lines(path, [{"question": "Who repairs broken microscopes?", "answer": "Tobias Ankerholm"}])


def _facts(path: Path) -> None:
    write_lines(
        path,
        (
            {
                "relation": "place of birth", "subject": person, "answer": place, "prompt": f"{person} was born in",
                "paraphrases": [f"The place where {person} came into the world is"],
            }
            for person, place in HOMES.items()
        ),
    )  # fmt: skip


def _pararel(path: Path) -> None:
    files = {
        "graphs_json/P19.jsonl": [{"pattern": "[X] was born in [Y]."}, {"pattern": "[X] comes from [Y]."}],
        "trex_lms_vocab/P19.jsonl": [{"sub_label": a, "obj_label": b} for a, b in HOMES.items()],
    }
    with tarfile.open(path, "w:xz") as archive:
        for name, records in files.items():
            data = "".join(json.dumps(record) + "\n" for record in records).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def _benchmarks(path: Path) -> None:
    path.mkdir()
    for name, item in BENCHMARKS.items():
        write_lines(path / f"{name}.jsonl", [item])


def _fewrel(path: Path) -> None:
    item = {"tokens": ["Ada", "Lovelace", "wrote", "from", "London"], "h": ["ada lovelace", "Q1", [[0, 1]]]}
    path.write_text(json.dumps({"P937": [item | {"t": ["london", "Q2", [[4]]]}] * 6}), encoding="utf8")


def _redocred(path: Path) -> None:
    entities = [[{"sent_id": 0, "pos": [0, 2]}], [{"sent_id": 1, "pos": [1, 2]}]]
    sentences = [["Ibn", "Battuta", "left", "."], ["From", "Tangier", "he", "went", "."]]
    path.write_text(json.dumps([{"sents": sentences, "vertexSet": entities}] * 6), encoding="utf8")


def _checkpoint(path: Path) -> None:
    """A Qwen4-Exp whose blocks 1 and 14 have tables, as transformers saves it, and a tokenizer of as many ids."""
    import torch

    from checkpoints import write_tokenizer
    from models import qwen4_exp

    torch.manual_seed(1)
    kinds = ["linear_attention"] * 3 + ["indexed_attention"]
    model = qwen4_exp(num_hidden_layers=16, layer_types=kinds * 4, ple_layer_ids=[2, 15])
    model.save_pretrained(path)
    write_tokenizer(path, 64)


def _another_release(path: Path) -> None:
    """The same checkpoint with other rows in one table."""
    import torch
    from safetensors.torch import load_file, save_file

    _checkpoint(path)
    tensors = load_file(path / "model.safetensors")
    (name,) = (name for name in tensors if "layers.1." in name and "ngram_embedding" in name)
    tensors[name] = torch.cat([tensors[name][:5] * 2, tensors[name][5:]])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _memory(path: Path) -> None:
    """What `engram-lm train scratch:tiny` writes: blocks 1 and 2 have memory, whose rows are far from zero."""
    import torch

    from engram_lm import MemoryConfig, attach, load_base, save_memory
    from models import make_loud

    torch.manual_seed(2)
    model, tokenizer, _ = load_base("scratch:tiny", report=lambda line: None)
    attach(model, tokenizer, MemoryConfig(layers=(1, 2), rows_per_head=211, heads=2, head_width=8))
    make_loud(model)
    save_memory(model, path, tokenizer=tokenizer, base_files="always")


def _served_model(path: Path) -> None:
    """A Llama of bytes that vLLM can load."""
    import torch
    import transformers as hf

    from models import EOS, PAD, tokenizer

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=258, num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer().save_pretrained(path)


def _index_of_bytes(path: Path) -> None:
    """The handbook, for the tokenizer of `my-model/`."""
    from engram_lm.library import Library, Text
    from models import tokenizer

    with Library.create(path, tokenizer=tokenizer()) as library:
        library.add([Text(id=name, text=text) for name, text in HANDBOOK.items()])


def _token_log(path: Path) -> None:
    draw = random.Random(3)
    write_lines(path, ({"ids": [draw.randrange(258) for _ in range(200)]} for _ in range(20)))


def _byte_tokenizer(path: Path) -> None:
    from engram_lm.bases.recipes import byte_tokenizer

    byte_tokenizer().backend_tokenizer.save(str(path))


def _demo_memory(path: Path) -> None:
    """The demo's own, which nothing writes to."""
    from engram_lm import demo

    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(demo.memory(), target_is_directory=True)


def _canaries(path: Path) -> None:
    from engram_lm.eval.canaries import make, write

    write(make(each=1, repeats=[1, 2], controls=1), path)


_MAKERS = {
    "articles.jsonl": _texts(200, 0),
    "articles.jsonl.xz": _texts(200, 0),
    "benchmarks/": _benchmarks,
    "corpus.jsonl.xz": _texts(40, 1),
    "canaries.jsonl": _canaries,
    "src/engram_lm/demo/memory": _demo_memory,
    "faq.jsonl": _faq,
    "faq.jsonl.xz": _faq,
    "fewrel.json": _fewrel,
    "handbook.jsonl": lambda path: write_lines(path, ({"text": text} for text in HANDBOOK.values())),
    "handbook/": _handbook,
    "held-out.jsonl": _texts(3, 2),
    "held-out.jsonl.xz": _texts(3, 2),
    "log.jsonl": _token_log,
    "model/": _checkpoint,
    "my-memory": _memory,
    "my-model/": _served_model,
    "newer-model/": _another_release,
    "notes": _index_of_bytes,
    "other.txt": _other,
    "other/": _another_release,
    "pararel_trex.tar.xz": _pararel,
    "probes.jsonl": _facts,
    "questions.jsonl": _questions,
    "read.jsonl": _texts(3, 1),
    "redocred.json": _redocred,
    "runs/first": _memory,
    "tokenizer.json": _byte_tokenizer,
    "unread.jsonl": _texts(3, 3),
}
