"""Flash attention and continuous batching: correct, or refused with an error.

The kernels need a GPU. Here transformers' own code, including unpadding, calls functions in plain PyTorch that compute
what the kernels document: causal from the last column, sequences of several lengths by their cumulative ends.
"""

from __future__ import annotations

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from peft import PeftModel
from transformers import ContinuousBatchingConfig, GenerationConfig

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """Of `[batch, length, heads, head_dim]`."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    mask = None
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    options = {"attn_mask": mask, "scale": softmax_scale, "enable_gqa": True}
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    """Of `[all tokens, heads, head_dim]`."""
    options = {key: value for key, value in options.items() if key in ("dropout_p", "softmax_scale", "causal")}
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = []
    for i in range(len(ends_q) - 1):
        own_q, own_k = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        parts.append(flash_attn_func(q[own_q][None], k[own_k][None], v[own_k][None], **options)[0])
    return torch.cat(parts)


@pytest.fixture
def flash_kernels(monkeypatch):
    functions = (flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **options: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)


@pytest.fixture
def model(flash_kernels) -> PeftModel:
    model = with_prefix(tiny_model("llama"))
    model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.fixture
def expected() -> PeftModel:
    return with_prefix(tiny_model("llama"))


def generate(model, ids, mask):
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)


def test_the_base_model_takes_these_kernels(flash_kernels):
    base, ids = tiny_model("llama"), random_ids(2, 9)
    expected = base(input_ids=ids).logits
    base.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(base(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_flash_attention_equals_sdpa(model, expected):
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for padding in (torch.ones_like(ids), mask, mask.flip(1)):
        actual = model(input_ids=ids, attention_mask=padding).logits
        torch.testing.assert_close(
            actual[padding.bool()],
            expected(input_ids=ids, attention_mask=padding).logits[padding.bool()],
            atol=1e-5,
            rtol=1e-4,
        )
    torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    for padding in (torch.ones_like(ids), mask):
        assert torch.equal(generate(model, ids, padding), generate(expected, ids, padding))


@torch.no_grad()
def test_rows_with_prefixes_of_several_lengths(model, expected):
    ids = random_ids(3, 10)
    for each in (model, expected):
        torch.manual_seed(5)
        each.add_adapter("long", PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=11, init_std=1.0))
        each.eval()
    names = ["long", "default", "__base__"]
    actual = model(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(actual, expected(input_ids=ids, adapter_names=names).logits, atol=1e-5, rtol=1e-4)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    answers = [
        each.generate(input_ids=ids, attention_mask=mask, adapter_names=names, max_new_tokens=8, do_sample=False)
        for each in (model, expected)
    ]
    assert torch.equal(*answers)


def test_gradients_through_flash_attention(model, expected):
    ids = random_ids(2, 12)
    for each in (model, expected):
        each.train()(input_ids=ids, labels=ids).loss.backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-3)


def test_token_dropout(model, expected):
    ids = random_ids(2, 12)
    padding = torch.ones_like(ids)
    padding[1, :5] = 0
    labels = ids.masked_fill(padding.cumsum(dim=1) < 2, -100)  # padding sees the prefix under sdpa alone
    for mask in (None, padding):
        for each in (model, expected):
            each.peft_config["default"].token_dropout = 0.5
            each.zero_grad()
            torch.manual_seed(3)
            each.train()(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            if ours.requires_grad:
                assert (theirs.grad == 0).any()
                torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-3)


def test_unsupported_inputs_are_refused(model):
    ids = random_ids(1, 8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="Packed sequences under flash attention"):
        model(input_ids=ids, position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match="Flash attention with a static cache"):
        model.generate(input_ids=ids, max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_is_refused(attention):
    model = with_prefix(tiny_model("llama", attention=attention))
    (result,) = (
        model.get_base_model()
        .generate_batch(
            [[5, 6, 7]],
            generation_config=GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16),
            progress_bar=False,
        )
        .values()
    )
    assert "one paged cache" in result.error
    assert not result.generated_tokens
