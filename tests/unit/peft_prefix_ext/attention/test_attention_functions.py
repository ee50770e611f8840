"""Attention functions besides eager, sdpa and flash: a prefix works with those that pass its self-test, the others are refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model
from helpers.tiny_seq2seq import tiny_encoder_decoder
from peft_prefix_ext import PrefixExtConfig


def wrapped_sdpa(module, query, key, value, attention_mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def ignores_the_prefix(module, query, key, value, attention_mask, **kwargs):
    """Attends to the last q columns only, which is correct without a prefix and without a cache."""
    last = query.shape[2]
    mask = None if attention_mask is None else attention_mask[..., -last:]
    return sdpa_attention_forward(module, query, key[:, :, -last:], value[:, :, -last:], mask, **kwargs)


@pytest.fixture(autouse=True)
def attention_functions():
    """Registers the functions for one test; without a mask function transformers passes no mask."""
    AttentionInterface.register("wrapped", wrapped_sdpa)
    AttentionInterface.register("without_masks", wrapped_sdpa)
    AttentionInterface.register("blind", ignores_the_prefix)
    for name in ("wrapped", "blind"):
        AttentionMaskInterface.register(name, sdpa_mask)
    yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        for name in ("wrapped", "without_masks", "blind"):
            interface._global_mapping.pop(name, None)


def padded_batch():
    """Ids and mask of two rows, longer than the windows of the tiny models, the second padded on the left."""
    ids = random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return ids, mask


@torch.no_grad()
def assert_equal_to_sdpa(model, name):
    expected = with_prefix(tiny_model(name))
    ids, mask = padded_batch()
    ours, theirs = (each(input_ids=ids, attention_mask=mask).logits[mask.bool()] for each in (model, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(*(each.generate(input_ids=ids, **options) for each in (model, expected)))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_function_of_the_user(name):
    assert_equal_to_sdpa(with_prefix(tiny_model(name, attention="wrapped")), name)


@torch.no_grad()
def test_a_function_without_masks():
    ids = random_ids(2, 20)
    model, expected = with_prefix(tiny_model("llama", attention="without_masks")), with_prefix(tiny_model("llama"))
    torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_a_function_set_after_the_prefix():
    model = with_prefix(tiny_model("gemma3"))
    model.get_base_model().set_attn_implementation("wrapped")
    assert_equal_to_sdpa(model, "gemma3")


@torch.no_grad()
def test_flex_attention():
    """Uses the compiled kernel, which takes most of a minute to compile."""
    torch.compiler.reset()  # earlier compilations change how the next one is done
    model, expected = with_prefix(tiny_model("llama", attention="flex_attention")), with_prefix(tiny_model("llama"))
    ids, mask = padded_batch()
    ours, theirs = (each(input_ids=ids, attention_mask=mask).logits[mask.bool()] for each in (model, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.fixture
def uncompiled(monkeypatch):
    """Runs flex attention without a kernel, by torch's debugging mode; transformers would reuse what it compiled before."""

    def uncompiled(query, key, value, training=False, **kwargs):
        return torch_flex.flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", uncompiled)


@pytest.mark.parametrize("name", ["gemma3", pytest.param("mistral", marks=pytest.mark.soak)])
def test_flex_attention_with_windows(name, uncompiled):
    assert_equal_to_sdpa(with_prefix(tiny_model(name, attention="flex_attention")), name)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_flex_attention_with_windows_compiled(name):
    assert_equal_to_sdpa(with_prefix(tiny_model(name, attention="flex_attention")), name)


@pytest.mark.usefixtures("uncompiled")
def test_flex_attention_with_adapter_names():
    ids, mask = padded_batch()
    answers = []
    for attention in ("sdpa", "flex_attention"):
        model = with_prefix(tiny_model("llama"))
        torch.manual_seed(3)
        model.add_adapter("long", PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=11, init_std=1.0))
        model.get_base_model().set_attn_implementation(attention)
        names = ["long", "__base__"]
        answers.append(model.eval()(input_ids=ids, attention_mask=mask, adapter_names=names).logits[mask.bool()])
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-4)


def test_a_function_that_does_not_see_the_prefix_is_refused():
    with pytest.raises(ValueError, match="gives other logits after a prefix"):
        with_prefix(tiny_model("llama", attention="blind"))
    model = with_prefix(tiny_model("llama"))
    ids = random_ids(1, 4)
    expected = model(input_ids=ids).logits
    model.get_base_model().set_attn_implementation("blind")
    with pytest.raises(ValueError, match="gives other logits after a prefix"):
        model(input_ids=ids)
    model.get_base_model().set_attn_implementation("sdpa")
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_an_encoder_decoder_model_cannot_be_tested():
    base = tiny_encoder_decoder("t5")
    base.config._attn_implementation = "wrapped"
    with pytest.raises(ValueError, match="attn_implementation='wrapped', which PREFIX_EXT cannot test"):
        with_prefix(base, task_type="SEQ_2_SEQ_LM")
