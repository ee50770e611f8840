"""Calls with ready-made masks and without positions: the text still starts right behind the prefix."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext.injection.position_ids import text_columns

LENGTH = 20  # longer than the sliding windows of the tiny models
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
    "model_type": "siglip_vision_model",
}
VISION_4 = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}


def image_model(name: str = "gemma3", attention: str = "sdpa"):
    """Gemma with its vision tower: the outer model makes the masks of both layer types, and in Gemma 4 positions too."""
    vision = VISION if name == "gemma3" else VISION_4
    config = CONFIG_MAPPING[name](
        text_config=tiny_model(name).config.to_dict(), vision_config=vision, audio_config=None
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()


def padded(ids, num_padding, side):
    filler, mask = ids.new_zeros(len(ids), num_padding), torch.ones_like(ids)
    parts = [(filler, ids), (filler, mask)] if side == "left" else [(ids, filler), (mask, filler)]
    return [torch.cat(pair, dim=1) for pair in parts]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_masks_made_by_the_outer_model(name, attention):
    model = with_prefix(image_model(name, attention), init="tokens", init_token_ids=list(range(5, 12)))
    ids = random_ids(2, LENGTH)
    expected = model(input_ids=ids).logits
    for num_padding in (1, 4, 16):
        for side in ("left", "right"):
            longer, mask = padded(ids, num_padding, side)
            logits = model(input_ids=longer, attention_mask=mask).logits[mask.bool()].view_as(expected)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_given_positions_are_kept(name):
    model = with_prefix(image_model(name), init="tokens", init_token_ids=list(range(5, 12)))
    ids = random_ids(1, LENGTH)
    expected = model(input_ids=ids).logits
    longer, mask = padded(ids, 6, "left")
    counted = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    logits = model(input_ids=longer, attention_mask=mask, position_ids=counted).logits[:, 6:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    apart = model(input_ids=longer, attention_mask=mask, position_ids=torch.arange(LENGTH + 6)[None]).logits[:, 6:]
    assert not torch.allclose(apart, expected, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_a_decoding_loop_of_the_user(name):
    """Prefill and decoding with token ids and mask only, as trainers compute log-probabilities."""
    model = with_prefix(image_model(name), init="tokens", init_token_ids=list(range(5, 12)))
    ids = random_ids(1, LENGTH)
    expected = model(input_ids=ids).logits
    longer, mask = padded(ids, 5, "left")
    cache = DynamicCache(config=model.config)
    outputs = [model(input_ids=longer[:, :12], attention_mask=mask[:, :12], past_key_values=cache).logits[:, 5:]]
    for end in range(13, longer.shape[1] + 1):
        new = longer[:, end - 1 : end]
        outputs.append(model(input_ids=new, attention_mask=mask[:, :end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_masks_made_by_the_caller(name, attention):
    model = with_prefix(tiny_model(name, attention=attention), init="tokens", init_token_ids=list(range(5, 12)))
    ids = random_ids(2, LENGTH)
    expected = model(input_ids=ids).logits
    longer, mask = padded(ids, 6, "left")
    inputs = {
        "config": model.config,
        "inputs_embeds": model.get_input_embeddings()(longer),
        "attention_mask": mask,
        "past_key_values": None,
    }
    ready = create_causal_mask(**inputs)
    if name == "gemma3":
        ready = {"full_attention": ready, "sliding_attention": create_sliding_window_causal_mask(**inputs)}
    logits = model(input_ids=longer, attention_mask=ready).logits[:, 6:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_packed_texts_are_not_padding():
    """Texts packed by a mask alone have consecutive positions, as without a prefix."""
    model = with_prefix(tiny_model("llama"))
    ids = random_ids(1, 9)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[4:, :4] = False
    packed = model(input_ids=ids, attention_mask=mask[None, None]).logits
    positions = torch.arange(9)[None]
    second = model(input_ids=ids[:, 4:], position_ids=positions[:, 4:]).logits
    torch.testing.assert_close(packed[:, 4:], second, atol=1e-5, rtol=1e-4)


def test_text_columns():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    causal = torch.ones(3, 3).tril().bool() & mask.bool()[:, None, None]
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~causal, torch.finfo(torch.float32).min)
    for given in (mask, causal, additive, {"sliding": None, "full": causal}):
        assert torch.equal(text_columns(given).long(), mask)
    for given in (None, {}, {"full": None}, torch.ones(3)):
        assert text_columns(given) is None
