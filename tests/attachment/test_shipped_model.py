"""transformers' own Qwen4-Exp with its rows left in the checkpoint: logits unchanged, one tensor or shards, host or disk."""

import json

import pytest

from checkpoints import write_safetensors
from engram_lm.errors import CheckpointError, ConfigError, ModelError
from engram_lm.storage import open_shipped
from engram_lm.tabletools.doctor import examine
from engram_lm.tabletools.sources import open_source

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

from models import qwen4_exp  # noqa: E402

IDS = torch.tensor([[5, 9, 3, 7, 7, 22, 60, 3, 41], [11, 12, 13, 14, 15, 16, 17, 18, 3]])


@pytest.fixture(scope="module", params=[1, 12], ids=["one tensor", "twelve shards"])
def checkpoint(request, tmp_path_factory):
    """A random Qwen4-Exp as transformers saves it, and its logits."""
    torch.manual_seed(1)
    model = qwen4_exp(split_ngram_parts=request.param)
    directory = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(directory, max_shard_size="60KB")
    with torch.no_grad():
        return directory, model(IDS).logits, model.generate(IDS, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("rows", ["disk", "host"])
def test_logits_do_not_change(checkpoint, rows):
    from engram_lm import load_shipped

    directory, logits, generated = checkpoint
    model = load_shipped(directory, rows=rows).eval()
    assert not any("ngram_embedding" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
        assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), generated)
        # and the rows are what makes them: another row, other logits
        store = model.model.layers[1].ple.ple_embedding.ngram_embedding.store
        gather = store.gather
        store.gather = lambda *args, **kwargs: gather(*args, **kwargs) + 1
        assert not torch.equal(model(IDS).logits, logits)


def test_logits_do_not_change_in_half_precision(checkpoint):
    from engram_lm import load_shipped

    in_one = len(open_shipped(checkpoint[0])[1].segments) == 1
    dtype = torch.bfloat16 if in_one else torch.float16
    with torch.no_grad():
        wanted = hf.AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=dtype)(IDS).logits
        assert torch.equal(load_shipped(checkpoint[0], dtype=dtype)(IDS).logits, wanted)
        cast = hf.AutoModelForCausalLM.from_pretrained(checkpoint[0]).to(dtype)
        assert torch.equal(load_shipped(checkpoint[0]).to(dtype)(IDS).logits, cast(IDS).logits)


def test_names_of_the_released_model_with_vision(tmp_path):
    from engram_lm import load_shipped

    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 16}
    text = qwen4_exp(split_ngram_parts=4).config.to_dict()
    model = hf.Qwen4ExpForConditionalGeneration(
        hf.Qwen4ExpConfig(text_config=text, vision_config=vision)
    ).eval()
    model.save_pretrained(tmp_path)
    name = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding.weight"
    assert open_shipped(tmp_path)[1].name == name
    with torch.no_grad():
        logits = model(IDS).logits
        whole = load_shipped(tmp_path, model_class=hf.Qwen4ExpForConditionalGeneration)
        assert torch.equal(whole.eval()(IDS).logits, logits)
        assert torch.equal(load_shipped(tmp_path)(IDS).logits, logits)


def test_rows_behind_a_cache_of_ones_own(checkpoint):
    from engram_lm import load_shipped
    from engram_lm.storage import CachedStore, DiskStore

    model = load_shipped(
        checkpoint[0], rows=lambda layout: CachedStore(DiskStore(layout), budget_bytes=1 << 20)
    )
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(IDS).logits, checkpoint[1])


def test_a_loaded_model_gives_its_rows_back(checkpoint):
    from engram_lm.attachment.shipped import leave_rows

    directory, logits, _ = checkpoint
    model = leave_rows(hf.AutoModelForCausalLM.from_pretrained(directory), directory)
    assert not any("ngram_embedding" in name for name in model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)


def test_loading_leaves_transformers_as_it_was(checkpoint):
    from engram_lm import load_shipped

    load_shipped(checkpoint[0])
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint[0])
    assert type(model.model.layers[1].ple.ple_embedding.ngram_embedding) is torch.nn.Embedding
    assert not any("ngram" in name for name in type(model)._keys_to_ignore_on_load_unexpected)


def test_an_fp8_table_as_transformers_reads_it(tmp_path):
    """`FP8Embedding`: bfloat16 rows times a bfloat16 scale."""
    from transformers.integrations.finegrained_fp8 import FP8Embedding

    from engram_lm.attachment.shipped import leave_rows

    codes = torch.randn(424, 6).to(torch.float8_e4m3fn)
    scale = torch.tensor([0.0371], dtype=torch.bfloat16)
    model = qwen4_exp(ple_layer_ids=[2]).to(torch.bfloat16)
    embedding = FP8Embedding(424, 6)
    embedding.weight.data, embedding.weight_scale.data = codes, scale
    model.model.layers[1].ple.ple_embedding.ngram_embedding = embedding
    prefix = "model.layers.1.ple.ple_embedding.ngram_embedding"
    tensors = {
        f"{prefix}.weight_scale": ("BF16", scale.view(torch.uint16).numpy()),
        f"{prefix}.weight": ("F8_E4M3", codes.view(torch.uint8).numpy()),
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with torch.no_grad():
        wanted = model(IDS).logits
        assert wanted.isfinite().all()
        assert torch.equal(leave_rows(model, tmp_path)(IDS).logits, wanted)


@pytest.mark.parametrize("scale_dtype", ["BF16", "F32"])
def test_an_fp8_checkpoint_as_transformers_loads_it(tmp_path, scale_dtype):
    """One scale a table; in a bfloat16 model transformers rounds a float32 one."""
    from safetensors.torch import load_file

    from engram_lm import load_shipped

    qwen4_exp(split_ngram_parts=4).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors, scale = {}, torch.tensor([0.0123])
    scale = ("F32", scale) if scale_dtype == "F32" else ("BF16", scale.bfloat16().view(torch.uint16))
    names = {torch.bfloat16: "BF16", torch.int64: "I64", torch.float32: "F32"}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if "ngram_embedding" in name:
            codes = (tensor.float() * 80).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[name] = ("F8_E4M3", codes.view(torch.uint8))
            tensors[name.split("shard_")[0] + "weight_scale"] = scale
        else:
            is_bf16 = tensor.dtype == torch.bfloat16
            tensors[name] = (names[tensor.dtype], tensor.view(torch.uint16) if is_bf16 else tensor)
    tensors = {name: (dtype, tensor.numpy()) for name, (dtype, tensor) in tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", tensors, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    kept = ["proj", "lm_head", "mlp", "linear_attn", "self_attn", "hyper"]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "modules_to_convert": ["ngram_embedding"],
        "modules_to_not_convert": kept,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(loaded.model.layers[1].ple.ple_embedding.ngram_embedding).__name__ == "FP8Embedding"
    with torch.no_grad():
        wanted = loaded(IDS).logits
        assert torch.equal(load_shipped(tmp_path, dtype=torch.bfloat16)(IDS).logits, wanted)
        assert torch.equal(load_shipped(tmp_path, rows="host", dtype=torch.bfloat16)(IDS).logits, wanted)


def test_what_cannot_be_done_with_rows_in_files(checkpoint, tmp_path):
    import pickle

    from engram_lm import load_shipped
    from engram_lm.attachment.shipped import leave_rows

    model = load_shipped(checkpoint[0])
    with pytest.raises(CheckpointError, match="saving it would lose them"):
        model.save_pretrained(tmp_path / "copy")
    with pytest.raises(CheckpointError, match="cannot be pickled"):
        pickle.dumps(model.model.layers[1].ple.ple_embedding.ngram_embedding)
    with pytest.raises(ConfigError, match="wanted 'disk', 'host'"):
        load_shipped(checkpoint[0], rows="gpu")
    other = qwen4_exp(ngram_vocab_size_base=103)
    with pytest.raises(CheckpointError, match="rows of 6 numbers; the model wants"):
        leave_rows(other, checkpoint[0])
    with pytest.raises(CheckpointError, match="has tables for layers 1, 2"):
        leave_rows(qwen4_exp(ple_layer_ids=[1]), checkpoint[0])
    hf.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a llama"):
        load_shipped(tmp_path)


def test_constants_in_the_checkpoint_are_those_of_its_config(checkpoint):
    report = examine(open_source(checkpoint[0]), sample=None)
    assert report.wrong == []
    told = [f.text for f in report.findings if f.check == "constants"]
    assert told == ["multipliers, offsets, moduli in the checkpoint are those of config.json"] * 2
