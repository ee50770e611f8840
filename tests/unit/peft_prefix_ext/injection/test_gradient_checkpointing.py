"""Which parameters train, and that gradients under gradient checkpointing equal those without."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers.prefixed import perturb, with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext.injection.reparam import PrefixMLP


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("reparam", ["none", "mlp"])
@pytest.mark.parametrize("reentrant", [False, True, None])
def test_gradients_under_checkpointing_equal_those_without(name, reparam, reentrant):
    model = with_prefix(tiny_model(name), reparam=reparam, num_frozen_tokens=2)
    perturb(model)
    model.train()
    for module in model.modules():  # the two passes must see the same network
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = random_ids(2, 33)
    expected = gradients(model, ids)
    options = {"preserve_rng_state": True} if reentrant is None else {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    actual = gradients(model, ids)
    assert expected.keys() == actual.keys()
    for key in expected:
        assert expected[key].abs().max() > 0
        assert torch.equal(actual[key], expected[key]), key


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_function_that_ignores_its_keywords(llama, reentrant):
    """As ms-swift puts in the place of torch's."""
    model = with_prefix(llama, reparam="mlp").train()
    perturb(model)
    ids = random_ids(2, 33)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": not reentrant})

    def ours(*args, use_reentrant, **kwargs):
        return checkpoint(*args, use_reentrant=reentrant, **kwargs)

    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = functools.partial(ours, use_reentrant=not reentrant)
    actual = gradients(model, ids)
    for key in expected:
        assert expected[key].abs().max() > 0
        assert torch.equal(actual[key], expected[key]), key


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("reparam", ["none", "mlp"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forward_passes_before_one_backward_pass(name, reparam, reentrant):
    model = with_prefix(tiny_model(name), reparam=reparam).train()
    perturb(model)
    short, long = random_ids(2, 9), random_ids(2, 33)
    padded = torch.ones_like(long)
    padded[0, :12] = 0
    late = {"attention_mask": padded, "position_ids": (padded.cumsum(-1) - 1).clamp(min=0)}

    def joint():
        model.zero_grad()
        losses = [model(input_ids=long, labels=long, **late).loss, model(input_ids=long, labels=long).loss]
        with torch.no_grad():
            model(input_ids=short)
        (losses[0] + 2 * losses[1] + model(input_ids=short, labels=short).loss).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = joint()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    actual = joint()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], atol=1e-6, rtol=1e-4, msg=key)


def test_gradient_equals_finite_difference():
    model = with_prefix(tiny_model("gpt2").double())  # other architectures compute norms in float32
    ids = random_ids(1, 6)
    parameter = next(p for p in model.parameters() if p.requires_grad)

    def loss():  # transformers computes the loss in float32
        return torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])

    def loss_at(delta):
        with torch.no_grad():
            parameter[1, 3, 5] += delta
            value = loss().item()
            parameter[1, 3, 5] -= delta
        return value

    loss().backward()
    assert parameter.grad[1, 3, 5].item() == pytest.approx((loss_at(1e-5) - loss_at(-1e-5)) / 2e-5, rel=1e-4)


@pytest.mark.parametrize(("reparam", "marker"), [("none", "prefix_ext_key"), ("mlp", "prefix_ext_reparam")])
def test_only_the_prefix_trains(llama, reparam, marker):
    model = with_prefix(llama, reparam=reparam, num_frozen_tokens=1)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any(marker in name for name in trainable)
    assert all("prefix_ext_" in name for name in trainable)
    trained, _ = model.get_nb_trainable_parameters()
    if reparam == "none":
        assert trained == 3 * 2 * (2 * 6 * 16)


@pytest.mark.parametrize("reparam", ["none", "mlp"])
def test_frozen_tokens_stay_under_weight_decay(llama, reparam):
    model = with_prefix(llama, reparam=reparam, num_frozen_tokens=2).train()
    decoder_hook = model.get_base_model().model.prefix_ext

    def materialized():
        layer = model.get_base_model().model.layers[1].self_attn.prefix_ext
        mlp = decoder_hook.prefix_ext_reparam["default"] if reparam == "mlp" else None
        return layer.materialize("default", mlp()[1] if mlp else None).key.detach().clone()

    before = materialized()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        gradients(model, random_ids(2, 8))
        optimizer.step()
    after = materialized()
    assert torch.equal(after[:, :2], before[:, :2])
    assert not torch.isclose(after[:, 2:], before[:, 2:]).any()


def test_mlp_is_evaluated_once_per_forward_and_once_for_all_decoding_steps(llama, monkeypatch):
    model = with_prefix(llama, reparam="mlp")
    calls = []
    project = PrefixMLP.project
    monkeypatch.setattr(PrefixMLP, "project", lambda self: calls.append(1) or project(self))
    model.train()(input_ids=random_ids(5, 4))
    assert len(calls) == 1
    model.eval()
    with torch.no_grad():
        model.generate(input_ids=random_ids(2, 4), attention_mask=torch.ones(2, 4, dtype=torch.long), max_new_tokens=8)
        assert len(calls) == 2
        before = model(input_ids=random_ids(1, 4)).logits
        perturb(model)
        assert not torch.equal(model(input_ids=random_ids(1, 4)).logits, before)


def test_reparameterization_is_exact_at_step_0():
    flat = with_prefix(tiny_model("llama"), reparam="none")
    mlp = with_prefix(tiny_model("llama"), reparam="mlp", reparam_num_layers=2, reparam_activation="gelu")
    ids = random_ids(2, 9)
    assert torch.equal(flat(input_ids=ids).logits, mlp(input_ids=ids).logits)
