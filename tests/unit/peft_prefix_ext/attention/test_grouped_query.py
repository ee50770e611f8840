"""Grouped-query attention over a prefix copies no K/V and equals transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.prefixed import perturb, prefix_layers, with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext.attention.grouped_query import (
    additive_mask,
    grouped_query_attention_forward,
    register_grouped_query_attention,
)

ROWS, HEADS, TOKENS, LENGTH = 2, 4, 7, 11


@pytest.fixture
def transformers_own():
    ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa_attention_forward)
    yield
    ALL_ATTENTION_FUNCTIONS.register("sdpa", grouped_query_attention_forward)


def training_step(model, padded):
    """Returns logits, gradients, the shapes that autograd saves, and how many masks are among them."""
    ids = random_ids(ROWS, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0 if padded else 1
    kept, masks = [], set()

    def pack(tensor):
        kept.append(tensor.shape[:3])
        if tensor.shape[1:] == (1, LENGTH, TOKENS + LENGTH):
            masks.add(tensor.data_ptr())
        return tensor

    model.zero_grad()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    logits.square().mean().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad], kept, len(masks)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_no_copy_for_each_head_and_equal_results(name, padded, request):
    model = with_prefix(tiny_model(name)).train()
    perturb(model)
    logits, gradients, kept, masks = training_step(model, padded)
    request.getfixturevalue("transformers_own")
    expected, expected_gradients, kept_before, masks_before = training_step(model, padded)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=1e-4)
    repeated = (ROWS, HEADS, TOKENS + LENGTH)
    assert repeated in kept_before
    assert repeated not in kept
    # One for all layers of a kind, of which Gemma 3 has two.
    assert (masks, masks_before) == (1 if name == "llama" else 2, len(prefix_layers(model)))


def test_a_registered_attention_function_is_kept(transformers_own):
    def own(*args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("sdpa", own)
    register_grouped_query_attention()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own


def test_a_mask_changed_in_place_is_converted_again():
    mask = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    assert additive_mask(mask, torch.float32) is additive_mask(mask, torch.float32)
    mask[..., 0] = False
    assert additive_mask(mask, torch.float32)[..., 0].isneginf().all()
    assert additive_mask(mask, torch.float64).dtype == torch.float64
    with torch.no_grad():
        assert additive_mask(mask, torch.float32) is mask
