"""Token dropout: in training only, it hides whole virtual tokens from all queries, in all layers alike."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from helpers.prefixed import REPARAMS, perturb, prefix_layers, with_prefix
from helpers.prefixed_seq2seq import EVERYWHERE, READ, WRITTEN, prefixed
from helpers.tiny import random_ids, tiny_model
from helpers.tiny_seq2seq import tiny_encoder_decoder
from peft_prefix_ext.injection.decoder_hook import decoder_hooks_of

P = 7
IDS = random_ids(2, 40)  # longer than the windows and chunks of the tiny models


def drop_tokens(model, seed=3):
    """Turns the dropout of a model's prefix on, not that of its base, and fixes what the next pass draws."""
    for hook in decoder_hooks_of(model):
        hook.train()
    torch.manual_seed(seed)


def kept_in(model):
    """Returns which virtual tokens the last forward pass of each stack kept."""
    kept = [hook.context.kept_tokens for hook in decoder_hooks_of(model)]
    assert all(0 < each.sum() < P for each in kept)
    return kept


def reference(base, model, kept, padding):
    """Returns the logits of the base model after a cache of the kept tokens alone, all tokens at their positions."""
    cache = DynamicCache()
    for layer in prefix_layers(model):
        kv = (tensor[:, kept].expand(len(IDS), -1, -1, -1) for tensor in layer.materialize("default", None))
        cache.update(*kv, layer.index)
    positions = (padding.cumsum(dim=-1) - 1).clamp(min=0) + P
    virtual = torch.arange(P)[kept].expand(len(IDS), -1)
    all_positions = torch.cat([virtual, positions], dim=1)
    columns = torch.cat([torch.full_like(virtual, -1), torch.arange(IDS.shape[1]).expand_as(IDS)], dim=1)
    is_token = torch.cat([torch.ones_like(virtual), padding], dim=1).bool()
    causal = (columns[:, None] <= torch.arange(IDS.shape[1])[:, None]) & is_token[:, None]
    near = all_positions[:, None] > positions[..., None] - (getattr(base.config, "sliding_window", None) or 10**6)
    full, sliding = (
        torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
        for seen in (causal, causal & near)
    )
    mask = full if base.config.model_type != "gemma3_text" else {"full_attention": full, "sliding_attention": sliding}
    return base(input_ids=IDS, past_key_values=cache, attention_mask=mask, position_ids=positions).logits


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_base_model_after_the_kept_tokens(name, attention):
    base, model = tiny_model(name, attention="eager"), with_prefix(tiny_model(name, attention=attention))
    model.peft_config["default"].token_dropout = 0.5
    padding = torch.ones_like(IDS)
    padding[1, :5] = 0
    for mask in (None, padding):
        whole = model.eval()(input_ids=IDS, attention_mask=mask).logits
        drop_tokens(model)
        logits = model(input_ids=IDS, attention_mask=mask).logits
        mask = torch.ones_like(IDS) if mask is None else mask
        expected = reference(base, model, *kept_in(model), mask)
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
        assert (logits - whole)[mask.bool()].abs().max() > 0.01


def take_out(model, kept, monkeypatch):
    """Takes the tokens that are not kept out of the attention function, and so out of any mask, bias and order.

    Returns:
        How many columns the calls of the function had.
    """
    softmax, sdpa, widths = functional.softmax, functional.scaled_dot_product_attention, set()

    def kept_columns(width):
        widths.add(width)
        stacks = zip(decoder_hooks_of(model), kept, strict=True)
        (own,) = (each for hook, each in stacks if hook.context is not None and hook.context.is_running)
        return functional.pad(own, (0, width - P), value=True)

    def patched_softmax(scores, *args, **kwargs):
        if scores.shape[-1] > P:  # not an expert's
            scores = scores.masked_fill(~kept_columns(scores.shape[-1]), -torch.inf)
        return softmax(scores, *args, **kwargs)

    def patched_sdpa(query, key, value, attn_mask=None, **kwargs):
        columns = kept_columns(key.shape[2])
        mask = None if attn_mask is None else attn_mask.expand(-1, -1, -1, len(columns))[..., columns]
        return sdpa(query, key[:, :, columns], value[:, :, columns], attn_mask=mask, **kwargs)

    monkeypatch.setattr(functional, "softmax", patched_softmax)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", patched_sdpa)
    return widths


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, "sdpa") for name in ("llama4", "gemma3n", "falcon:alibi", "deepseek_v3")),
        *((name, "eager") for name in ("llama4", "gemma3n", "gpt_neo", "bloom", "mpt")),
    ],
)
def test_attention_without_the_dropped_columns(name, attention, monkeypatch):
    # With ALiBi, Falcon's own two implementations differ.
    other = attention if name == "falcon:alibi" else "eager"
    model, expected = (with_prefix(tiny_model(name, attention=each)) for each in (attention, other))
    model.peft_config["default"].token_dropout = 0.5
    whole = model(input_ids=IDS).logits
    drop_tokens(model)
    logits = model(input_ids=IDS).logits
    widths = take_out(expected, kept_in(model), monkeypatch)
    torch.testing.assert_close(logits, expected(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    assert widths == {P + IDS.shape[1]}
    assert (logits - whole).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders(name, attention, monkeypatch):
    """Each stack has its own draw; cross-attention has that of the decoder."""
    model, expected = (
        prefixed(tiny_encoder_decoder(name, attention=each), **EVERYWHERE) for each in (attention, "eager")
    )
    model.peft_config["default"].token_dropout = 0.5
    padding = torch.ones_like(READ)
    padding[1, 8:] = 0
    for mask in (None, padding):
        inputs = {"input_ids": READ, "decoder_input_ids": WRITTEN, "attention_mask": mask}
        whole = model.eval()(**inputs).logits
        drop_tokens(model)
        logits = model(**inputs).logits
        with monkeypatch.context() as patch:
            widths = take_out(expected, kept_in(model), patch)
            torch.testing.assert_close(logits, expected(**inputs).logits, atol=1e-5, rtol=1e-5)
        assert widths == {P + READ.shape[1], P + WRITTEN.shape[1]}
        assert (logits - whole).abs().max() > 0.01


def gradients(model, **inputs):
    model.zero_grad()
    torch.manual_seed(5)
    loss = sum(model(**{name: ids[:, :end] for name, ids in inputs.items()}).loss for end in (None, 5))
    loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])  # gpt2 has dropout itself
@pytest.mark.parametrize("form", ["flat", "residual"])
def test_checkpointing_changes_no_gradient(name, form):
    settings = {"token_dropout": 0.5, "prefix_dropout": 0.3, "num_frozen_tokens": 1, **REPARAMS[form]}
    model = with_prefix(tiny_model(name), **settings).train()
    perturb(model, std=0.1)
    inputs = {"input_ids": IDS, "labels": IDS}
    expected = gradients(model, **inputs)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for key, actual in gradients(model, **inputs).items():
            torch.testing.assert_close(actual, expected[key], atol=1e-6, rtol=1e-4, msg=f"{key} {reentrant}")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_an_encoder_decoder(reentrant):
    model = prefixed(tiny_encoder_decoder("t5"), token_dropout=0.5, reparam="mlp", **EVERYWHERE).train()
    perturb(model, std=0.1)

    def backward():
        model.zero_grad()
        torch.manual_seed(5)
        model(input_ids=READ, labels=WRITTEN).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}

    expected = backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for key, actual in backward().items():
        torch.testing.assert_close(actual, expected[key], atol=1e-6, rtol=1e-4, msg=key)


def test_dropped_tokens_get_no_gradient_and_frozen_ones_stay(llama):
    model = with_prefix(llama, num_virtual_tokens=60, num_frozen_tokens=10, token_dropout=0.25).train()
    (hook,) = decoder_hooks_of(model)
    draws = []
    for _ in range(20):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        draws.append(hook.context.kept_tokens)
        for layer in prefix_layers(model):
            for parameter in (layer.prefix_ext_key["default"], layer.prefix_ext_value["default"]):
                has_gradient = parameter.grad.abs().amax(dim=(0, 2)) > 0
                assert torch.equal(has_gradient, draws[-1][10:])
    kept = torch.stack(draws)
    assert kept[:, :10].all()
    assert 0.7 < kept[:, 10:].float().mean() < 0.8
    assert len(kept.unique(dim=0)) == 20


@torch.no_grad()
def test_without_training_nothing_is_dropped_or_drawn(llama):
    model = with_prefix(llama, token_dropout=0.9)
    state = torch.get_rng_state()
    logits = model(input_ids=IDS).logits
    assert torch.equal(torch.get_rng_state(), state)
    model.peft_config["default"].token_dropout = 0.0
    assert torch.equal(model.train()(input_ids=IDS).logits, logits)
    assert torch.equal(torch.get_rng_state(), state)


def test_all_tokens_may_be_dropped(llama):
    """Then padding on the left, which sees nothing but the prefix, sees nothing."""
    model = with_prefix(llama, token_dropout=0.999).train()
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    torch.manual_seed(3)
    loss = model(input_ids=IDS, attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100)).loss
    loss.backward()
    assert not decoder_hooks_of(model)[0].context.kept_tokens.any()
    assert loss.isfinite()
    assert all((layer.prefix_ext_key["default"].grad == 0).all() for layer in prefix_layers(model))


@torch.no_grad()
def test_a_compiled_model():
    model = with_prefix(tiny_model("llama", num_hidden_layers=1), token_dropout=0.5).train()
    torch.compiler.reset()
    logits = []
    for each in (model, torch.compile(model, backend="eager")):
        torch.manual_seed(5)
        logits += [each(input_ids=IDS).logits for _ in range(2)]
    torch.compiler.reset()
    torch.testing.assert_close(logits[2:], logits[:2], atol=1e-6, rtol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_flex_attention_is_refused(llama):
    model = with_prefix(llama, token_dropout=0.5).train()
    decoder_hooks_of(model)[0].tested_attention.add("flex_attention")  # the test compiles for most of a minute
    model.get_base_model().set_attn_implementation("flex_attention")
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(ValueError, match="`token_dropout` is not supported with flex attention; use"),
    ):
        model(input_ids=IDS)
