"""`init="kv"`: K/V that the user gives, in every form, also from another position; what does not fit is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, StaticCache

from helpers.prefixed import prefix_kv, with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig

IDS = random_ids(2, 10)
TEXT_IDS = random_ids(1, 30, seed=7)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def test_kv_in_every_form(llama):
    cache = DynamicCache()
    with torch.no_grad():
        llama(input_ids=TEXT_IDS[:, :7], past_key_values=cache)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    static = StaticCache(llama.config, max_cache_len=16)
    with torch.no_grad():
        llama(input_ids=TEXT_IDS[:, :7], past_key_values=static)
    forms = [cache, static, pairs, {i: (k[0], v[0]) for i, (k, v) in enumerate(pairs)}]
    for given in forms:
        model = with_prefix(tiny_model("llama"), init="kv", init_kv=given)
        for (name, kv), (key, value) in zip(_pairs(prefix_kv(model)), pairs, strict=True):
            assert torch.equal(kv[0], key[0]), name
            assert torch.equal(kv[1], value[0]), name


def test_a_model_keeps_no_data(llama):
    cache = DynamicCache()
    llama(input_ids=TEXT_IDS[:, :7], past_key_values=cache)  # with gradients, which cannot be copied
    config = PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, init="kv", init_kv=cache)
    model = get_peft_model(llama, config)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert config.init_kv is cache
    again = get_peft_model(tiny_model("llama"), config)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="`init_kv` must be given when `init='kv'`"):
        model.add_adapter("other", model.peft_config["default"])


def _pairs(kv):
    names = [name for name in kv if name.endswith("key")]
    return [(name, (kv[name], kv[name.removesuffix("key") + "value"])) for name in names]


def kv(*shape, layers=3):
    return [(torch.ones(shape), torch.ones(shape))] * layers


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (kv(2, 6, 16), r"must have a key of shape \[2, 7, 16\] .* for layer 0, got \[2, 6, 16\]"),
        (kv(2, 2, 7, 16), r"for layer 0, got \[2, 2, 7, 16\]"),
        (kv(4, 7, 16), r"for layer 0, got \[4, 7, 16\]"),
        (kv(2, 7, 16, layers=2), "for each of the 3 layers, got 2"),
        (dict(enumerate(kv(2, 7, 16, layers=4))), r"must have K/V for layers \[0, 1, 2\], got \[0, 1, 2, 3\]"),
        ([torch.ones(2, 7, 16)] * 3, "must have a pair of K and V for layer 0, got Tensor"),
        ([(1, 2)] * 3, "for layer 0, got int"),
        (torch.ones(3), "must be a `Cache`, .* got Tensor"),
        ([(torch.full((2, 7, 16), float("nan")),) * 2] * 3, "holds NaN or Inf in the key of layer 0"),
    ],
)
def test_kv_of_another_shape_is_refused(given, message, llama):
    with pytest.raises(ValueError, match=message):
        with_prefix(llama, init="kv", init_kv=given)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_kv_before_text_at_another_position(name):
    """The last tokens of a longer text: the text after them goes on behind all of it."""
    model, ids, length = tiny_model(name, sliding_window=512), random_ids(2, 9), 7
    text = random_ids(1, 20)
    cache = DynamicCache()
    model(input_ids=text, past_key_values=cache)
    pairs = [(layer.keys[:, :, -length:], layer.values[:, :, -length:]) for layer in cache.layers]
    both = torch.cat([text.expand(2, -1), ids], dim=1)
    cache.batch_repeat_interleave(2)
    unseen = (torch.arange(29) >= 20 - length).long().expand(2, -1)
    expected = model(
        input_ids=ids, past_key_values=cache, attention_mask=unseen, position_ids=torch.arange(20, 29)[None]
    ).logits
    assert not torch.allclose(model(input_ids=both).logits[:, 20:], expected, atol=1e-2)
    kept = with_prefix(copy.deepcopy(model), init_kv=pairs)
    moved = with_prefix(model, init_kv=pairs, init_kv_next_position=20)
    torch.testing.assert_close(moved(input_ids=ids).logits, expected, atol=5e-5, rtol=1e-4)
    assert not torch.allclose(kept(input_ids=ids).logits, expected, atol=1e-2)


def test_kv_that_cannot_move(llama):
    gpt2 = tiny_model("gpt2")
    with pytest.raises(
        ValueError, match=r"rotation that could move it -2 positions, so `init_kv_next_position` must be 7"
    ):
        with_prefix(gpt2, init_kv=kv(4, 7, 16), init_kv_next_position=9)
    with pytest.raises(ValueError, match="`init_kv_next_position` must be an integer >= 0, got -1"):
        with_prefix(llama, init_kv=kv(2, 7, 16), init_kv_next_position=-1)
    with pytest.raises(ValueError, match="`init_kv_next_position` is only used with `init='kv'`"):
        with_prefix(llama, init_kv_next_position=9)


def test_a_cache_without_all_tokens_is_refused():
    model = tiny_model("mistral")  # all layers have a window of 24
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=TEXT_IDS, past_key_values=cache)
    for length in (23, 30):
        with pytest.raises(ValueError, match="does not hold all of its 30 tokens in layer 0"):
            with_prefix(model, init="kv", init_kv=cache, num_virtual_tokens=length)
