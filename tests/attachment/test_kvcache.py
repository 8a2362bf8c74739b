"""A decoding cache under the name that a model's forward has: `past_key_values`, or `cache` from transformers 5.24 on."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402
from transformers.cache_utils import Cache  # noqa: E402

import models  # noqa: E402
from engram_lm.errors import StateError  # noqa: E402
from engram_lm.kvcache import cache_in, cache_name, cache_of, with_cache  # noqa: E402


class Older:
    def forward(self, input_ids, past_key_values=None):
        pass


class Newer:
    def forward(self, input_ids, cache=None):
        pass


class Wrapper:
    def __init__(self, inner):
        self.inner = inner

    def forward(self, *args, **kwargs):
        pass

    def get_base_model(self):
        return self.inner


def test_a_cache_goes_by_the_name_that_the_forward_has():
    held = object()
    assert cache_name(Newer().forward) == "cache"
    assert cache_name(Wrapper(None).forward) is None
    assert with_cache(Older(), held) == {"past_key_values": held}
    assert with_cache(Newer(), held) == {"cache": held}
    assert with_cache(Wrapper(Newer()), held) == {"cache": held}
    assert with_cache(Newer(), None) == {}


def test_a_cache_is_found_under_either_name():
    held = DynamicCache()  # empty, and false where it is asked for its truth
    for name in ("cache", "past_key_values"):
        assert cache_in({"input_ids": 1, name: held}) is held
        assert cache_of(SimpleNamespace(**{name: held})) is held
    assert cache_in({"cache": None, "past_key_values": held}) is held
    assert cache_in({}) is None
    assert cache_of(SimpleNamespace(logits=1)) is None


class NewerDecoder(hf.LlamaModel):
    """A decoder that takes `cache`, whatever this transformers calls it."""

    def forward(self, input_ids=None, cache: Cache | None = None, **kwargs):
        return super().forward(input_ids=input_ids, **{OWN_NAME: cache}, **kwargs)


OWN_NAME = cache_name(hf.LlamaModel.forward)


class NewerModel(hf.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = NewerDecoder(config)
        self.post_init()

    def forward(self, input_ids=None, cache: Cache | None = None, **kwargs):
        output = self.model(input_ids=input_ids, cache=cache, **kwargs)
        return SimpleNamespace(logits=self.lm_head(output.last_hidden_state), cache=cache_of(output))


def test_memory_keeps_its_state_in_a_cache_of_the_newer_name():
    torch.manual_seed(1)
    model = models.give_memory(NewerModel(models.build("llama").config).eval())
    models.make_loud(model)
    ids = torch.randint(2, 250, (2, 9))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        output, parts = model(ids[:, :4], use_cache=True), []
        for t in range(4, 9):
            parts.append(output.logits[:, -1:])
            output = model(ids[:, t : t + 1], use_cache=True, **with_cache(model, cache_of(output)))
        given = DynamicCache(config=model.config)
        model(ids[:, :4], cache=given)
        from_given = model(ids[:, 4:], cache=given).logits
    assert torch.allclose(torch.cat(parts, 1), whole[:, 3:8], atol=1e-5)
    assert torch.allclose(from_given, whole[:, 4:], atol=1e-5)
    assert not torch.allclose(whole, model(ids, memory="off", use_cache=False).logits, atol=1e-3)
    with pytest.raises(StateError, match="Continuous batching"):
        model(ids, cache=object(), use_cache=False)
