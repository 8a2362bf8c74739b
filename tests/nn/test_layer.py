"""The Engram layer against transformers' own qwen4_exp, a plain reading of the V4.1 equations, and LongCat's mean."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen4ExpTextConfig
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

from engram_lm.addressing import PROFILES, resolve
from engram_lm.nn import (
    EmbeddingMean,
    EngramLayer,
    MemoryState,
    Window,
    gate,
    gate_plain,
    short_conv,
    short_conv_plain,
)
from engram_lm.tables import DeviceTable

EOS = 3


def qwen_pair(*, hidden=24, streams=2, heads=2, ngram=3, kernel=4, seed=0, dtype=torch.float32):
    """transformers' layer with every weight random, and ours holding the same numbers."""
    torch.manual_seed(seed)
    config = Qwen4ExpTextConfig(
        vocab_size=97,
        hidden_size=hidden,
        num_hidden_layers=2,
        layer_types=["linear_attention", "linear_attention"],
        ple_layer_ids=[1],
        ple_embed_dim=8 * heads * (ngram - 1),
        ple_conv_kernel_size=kernel,
        ngram_size=ngram,
        heads_per_ngram=heads,
        ngram_vocab_size_base=53,
        make_ngram_vocab_size_divisible_by=8,
        hc_count=streams,
        eos_token_id=EOS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    theirs = Qwen4ExpTextPLELayer(config, 0, 0).to(dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
    profile = (
        PROFILES["qwen-ple"]
        .replace(
            orders=tuple(range(2, ngram + 1)),
            heads=heads,
            rows_per_head=53,
            row_multiple=8,
            conv_dilation=ngram,
        )
        .replace(head_width=8, conv_kernel=kernel, seed=config.seed)
    )
    (scheme,) = resolve(profile, vocab_size=97, layers=(0,), eos_ids=(EOS,))
    ours = EngramLayer(
        hidden_size=hidden,
        memory_width=config.ple_embed_dim,
        branches=streams,
        conv_kernel=kernel,
        conv_dilation=ngram,
        eps=config.rms_norm_eps,
        dtype=dtype,
    )
    table = DeviceTable(n_rows=scheme.padded_rows, width=8)
    with torch.no_grad():
        ours.projection.weight.copy_(torch.cat([theirs.key_proj.weight, theirs.value_proj.weight]))
        ours.key_norm.copy_(1 + theirs.norm_key.weight.view(streams, hidden))
        ours.query_norm.copy_(1 + theirs.norm_query.weight.view(streams, hidden))
        ours.conv_norm.copy_(1 + theirs.norm_conv.weight.view(streams, hidden))
        ours.conv_weight.copy_(theirs.conv1d.weight[:, 0])
        table.rows_view().copy_(theirs.ple_embedding.ngram_embedding.weight)
    return theirs, ours, scheme, table


def run_ours(ours, scheme, table, hidden, ids, state=None):
    window = Window.begin(ids, None, state=state, keep=max(scheme.max_order - 1, ours.past_length))
    n_past = window.ids_BS.shape[1] - ids.shape[1]
    previous = window.ids_BS[:, max(0, n_past - scheme.max_order + 1) : n_past]
    address = torch.from_numpy(scheme.addresses(ids.numpy(), previous_BP=previous.numpy()))
    return ours(hidden, table.gather(address).flatten(2).to(hidden.dtype), window, key=0).delta


@pytest.mark.parametrize("streams", [2, 3, 4])
@pytest.mark.parametrize("ngram", [2, 3, 4])
def test_full_forward_is_transformers_qwen4_exp(streams, ngram):
    theirs, ours, scheme, table = qwen_pair(streams=streams, ngram=ngram, seed=streams)
    ids = torch.randint(0, 97, (2, 19))
    ids[0, 5], ids[1, 7], ids[1, 8] = EOS, EOS, EOS
    hidden = torch.randn(2, 19, streams * 24)
    with torch.no_grad():
        wanted = theirs(hidden, ids, None)
        got = run_ours(ours, scheme, table, hidden, ids)
    assert wanted.abs().max() > 0.5
    # both are float32 sums of some hundred terms in another order
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("cuts", [(1,) * 17, (5, 1, 1, 10), (2, 15)])
def test_cached_forward_is_transformers_qwen4_exp(cuts):
    theirs, ours, scheme, table = qwen_pair()
    ids = torch.randint(0, 97, (2, 17))
    ids[0, 5], ids[1, 7] = EOS, EOS
    hidden = torch.randn(2, 17, 2 * 24)
    cache = Cache(layers=[LinearAttentionLayer(number_of_states=3)])
    state = MemoryState(keep=9, fixed=False)
    begin = 0
    with torch.no_grad():
        whole = theirs(hidden, ids, None)
        for size in cuts:
            part = slice(begin, begin + size)
            wanted = theirs(hidden[:, part], ids[:, part], cache)
            got = run_ours(ours, scheme, table, hidden[:, part], ids[:, part], state)
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=2e-6 * float(whole.abs().max()))
            torch.testing.assert_close(got, whole[:, part], rtol=1e-6, atol=2e-6 * float(whole.abs().max()))
            begin += size


def test_forgetting_the_conv_state_would_be_seen():
    theirs, ours, scheme, table = qwen_pair()
    ids, hidden = torch.randint(4, 97, (1, 12)), torch.randn(1, 12, 48)
    with torch.no_grad():
        whole = theirs(hidden, ids, None)
        forgotten = run_ours(ours, scheme, table, hidden[:, 6:], ids[:, 6:])
    assert (forgotten - whole[:, 6:]).abs().max() > 1e-2


def test_v41_equations_read_plainly():
    """wkv = 4 keys and a value, gate in fp32 with the product of the two norms, no conv, no bias."""
    torch.manual_seed(1)
    width, streams, memory, eps = 20, 4, 48, 1e-6
    layer = EngramLayer(hidden_size=width, memory_width=memory, branches=streams, conv_kernel=0, eps=eps)
    with torch.no_grad():
        layer.key_norm.normal_(1, 0.3)
        layer.query_norm.normal_(1, 0.3)
    hidden, rows = torch.randn(2, 7, streams, width), torch.randn(2, 7, memory)
    wkv, weight = layer.projection.weight, layer.key_norm * layer.query_norm
    wkv, weight = wkv.detach(), weight.detach()
    wanted = torch.zeros_like(hidden)
    for b in range(2):
        for t in range(7):
            kv = wkv @ rows[b, t]
            value = kv[streams * width :]
            for m in range(streams):
                key, stream = kv[m * width : (m + 1) * width], hidden[b, t, m]
                key = key / math.sqrt(float((key**2).mean()) + eps)
                stream = stream / math.sqrt(float((stream**2).mean()) + eps)
                score = float((key * stream * weight[m]).sum()) / math.sqrt(width)
                score = math.copysign(math.sqrt(max(abs(score), 1e-6)), score)
                wanted[b, t, m] = value / (1 + math.exp(-score))
    got = layer(hidden, rows, Window.begin(torch.zeros(2, 7, dtype=torch.long), None)).delta
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("form", ["signed-sqrt", "plain"])
def test_gate_is_its_plain_twin_with_gradients(form):
    torch.manual_seed(0)
    key, hidden = (torch.randn(2, 5, 3, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    key_norm, query_norm = (torch.randn(3, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    fast = gate(key, hidden, key_norm * query_norm, eps=1e-6, form=form)
    plain = gate_plain(key, hidden, key_norm, query_norm, eps=1e-6, form=form)
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)
    inputs = (key, hidden, key_norm, query_norm)
    weights = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * weights).sum(), inputs),
        torch.autograd.grad((plain * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kernel", "dilation"), [(4, 3), (2, 1), (1, 5), (3, 4)])
def test_short_conv_is_conv1d_with_gradients(kernel, dilation):
    torch.manual_seed(0)
    inputs = torch.randn(2, 20, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, kernel, dtype=torch.float64, requires_grad=True)
    fast, plain = (
        short_conv(inputs, weight, dilation=dilation),
        short_conv_plain(inputs, weight, dilation=dilation),
    )
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * weights).sum(), (inputs, weight)),
        torch.autograd.grad((plain * weights).sum(), (inputs, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_new_memory_is_a_no_op_that_learns():
    """Zero rows: nothing is added, to the last bit, and yet the rows get a gradient."""
    torch.manual_seed(0)
    layer = EngramLayer(hidden_size=16, memory_width=12)
    hidden, rows = torch.randn(2, 6, 16), torch.zeros(2, 6, 12, requires_grad=True)
    output = layer(hidden, rows, Window.begin(torch.zeros(2, 6, dtype=torch.long), None))
    assert torch.equal(hidden + output.delta, hidden)
    (hidden + output.delta).square().sum().backward()
    assert rows.grad.abs().max() > 1e-3
    assert torch.isfinite(rows.grad).all()


def test_longcat_mean_read_plainly():
    torch.manual_seed(0)
    layer = EmbeddingMean(hidden_size=10, row_width=4, columns=6)
    embedding, rows = torch.randn(2, 3, 10), torch.randn(2, 3, 6, 4)
    projections = layer.projection.weight.split(4, 1)
    wanted = embedding + sum(rows[:, :, c] @ projections[c].T for c in range(6))
    torch.testing.assert_close(layer(embedding, rows), wanted / 7, rtol=1e-6, atol=1e-6)


def test_padding_adds_nothing_and_is_skipped():
    torch.manual_seed(0)
    layer = EngramLayer(hidden_size=8, memory_width=6, conv_kernel=3, conv_dilation=2)
    torch.nn.init.normal_(layer.conv_weight)
    hidden, rows = torch.randn(1, 9, 8), torch.randn(1, 9, 6)
    ids = torch.arange(9)[None]
    real = torch.tensor([[False, True, True, False, True, True, False, True, True]])
    padded = layer(hidden, rows, Window.begin(ids, real), key=0).delta
    without = layer(hidden[real][None], rows[real][None], Window.begin(ids[real][None], None), key=0).delta
    assert torch.equal(padded[~real], torch.zeros(3, 8))
    torch.testing.assert_close(padded[real][None], without, rtol=1e-6, atol=1e-6)


def test_values_in_bfloat16_are_gated_in_float32():
    torch.manual_seed(0)
    layer = EngramLayer(hidden_size=16, memory_width=12, dtype=torch.bfloat16)
    hidden, rows = torch.randn(1, 4, 16, dtype=torch.bfloat16), torch.randn(1, 4, 12)
    output = layer(hidden, rows, Window.begin(torch.zeros(1, 4, dtype=torch.long), None))
    assert output.gate.dtype == torch.float32
    assert output.delta.dtype == torch.bfloat16
    key = F.linear(rows.bfloat16(), layer.projection.weight)[..., :16]
    wanted = gate_plain(
        key.float()[:, :, None], hidden.float()[:, :, None], layer.key_norm, layer.query_norm, eps=1e-6
    )
    torch.testing.assert_close(output.gate, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["signed-sqrt", "plain"])
@pytest.mark.parametrize(
    ("streams", "kernel", "dilation"), [(1, 4, 3), (3, 4, 2), (2, 2, 1), (1, 1, 1), (2, 0, 1)]
)
@pytest.mark.parametrize("padded", ["whole", "left padding", "holes"])
def test_fused_layer_is_the_plain_one_with_gradients(form, streams, kernel, dilation, padded):
    layer = EngramLayer(
        hidden_size=40,
        memory_width=24,
        branches=streams,
        conv_kernel=kernel,
        conv_dilation=dilation,
        gate_form=form,
    )
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name != "projection.weight":
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.5)
    hidden, rows = torch.randn(3, 11, streams, 40), torch.randn(3, 11, 24)
    real = None
    if padded != "whole":
        real = torch.ones(3, 11, dtype=torch.bool)
        real[0, :4] = False
        if padded == "holes":
            real[1, 5:7] = False
    upstream, results = torch.randn(3, 11, streams, 40), []
    for path in (layer._fused, layer._plain):
        inputs = [hidden.clone().requires_grad_(), rows.clone().requires_grad_(), *layer.parameters()]
        window = Window.begin(torch.zeros(3, 11, dtype=torch.long), real)
        delta, alpha = path(layer.projection(inputs[1]), inputs[0], window, 0)
        gradients = torch.autograd.grad((delta * upstream).sum(), inputs)
        results.append([delta.detach(), alpha.detach(), *gradients])
    for fused, plain in zip(*results, strict=True):
        # float32 sums of hundreds of terms in another order
        torch.testing.assert_close(fused, plain, rtol=2e-5, atol=2e-5 * max(1.0, float(plain.abs().max())))


def test_fused_layer_is_what_runs_on_the_cpu_and_keeps_nan(monkeypatch):
    layer = EngramLayer(hidden_size=16, memory_width=8)
    monkeypatch.setattr(layer, "_plain", lambda *a: pytest.fail("the plain path ran"))
    hidden, rows = torch.randn(1, 5, 16), torch.randn(1, 5, 8)
    rows[0, 2] = float("nan")
    delta = layer(hidden, rows, Window.begin(torch.zeros(1, 5, dtype=torch.long), None)).delta
    assert torch.isnan(delta[0, 2]).all()
    assert torch.isfinite(delta[0, :2]).all()


def test_threads_do_not_change_the_result():
    layer = EngramLayer(hidden_size=256, memory_width=64)
    torch.nn.init.normal_(layer.conv_weight)
    hidden, rows = torch.randn(4, 300, 256), torch.randn(4, 300, 64)
    before, results = torch.get_num_threads(), []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            layer.zero_grad()
            delta = layer(hidden, rows, Window.begin(torch.zeros(4, 300, dtype=torch.long), None)).delta
            delta.square().sum().backward()
            results.append((delta.detach(), layer.conv_weight.grad.clone(), layer.key_norm.grad.clone()))
    finally:
        torch.set_num_threads(before)
    # the projection is torch's own and may round differently with the number of threads
    for one, three in zip(*results, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
