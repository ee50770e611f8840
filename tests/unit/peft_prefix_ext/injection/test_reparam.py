"""The reparameterization in all its forms: exact at step 0, saved as plain K/V, resumed without a change."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import PeftModel
from transformers.activations import ACT2FN

from helpers.prefixed import perturb, prefix_kv, with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig
from peft_prefix_ext.injection.reparam import PrefixMLP

IDS = random_ids(2, 30)
FORMS = [
    {"reparam_residual": residual, "reparam_shared_trunk": shared, "reparam_joint_kv": joint}
    for residual, shared, joint in itertools.product([True, False], repeat=3)
]


def prefixed(form, **config):
    return with_prefix(tiny_model("gemma3"), reparam="mlp", num_frozen_tokens=1, **form, **config)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def training_step(model):
    torch.manual_seed(0)
    model.zero_grad()
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    return logits(model)


@pytest.mark.parametrize("form", FORMS)
def test_exact_at_step_0_trained_saved_and_resumed(form, tmp_path):
    flat = with_prefix(tiny_model("gemma3"), num_frozen_tokens=1)
    model = prefixed(form, reparam_num_layers=2, reparam_dropout=0.1, reparam_activation="silu")
    expected = prefix_kv(flat)
    for name, kv in prefix_kv(model).items():
        torch.testing.assert_close(kv, expected[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model), logits(flat), atol=5e-5, rtol=1e-4)

    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert not torch.allclose(training_step(model), logits(flat), atol=1e-4)
    still = {name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])}
    # Heads that start at zero pass no gradient on in the first step.
    assert all(form["reparam_residual"] and "heads" not in name for name in still)

    perturb(model, std=0.1)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("gemma3"), tmp_path)), trained)
    resumed = PeftModel.from_pretrained(tiny_model("gemma3"), tmp_path, is_trainable=True)
    assert torch.equal(logits(resumed), trained)
    assert torch.equal(training_step(resumed), training_step(model))


@pytest.mark.parametrize("form", FORMS[::3])
def test_without_the_mlp_training_continues_from_the_kv(form, tmp_path):
    model = prefixed(form, save_reparam=False)
    perturb(model, std=0.1)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no reparameterization of this form"):
        resumed = PeftModel.from_pretrained(
            tiny_model("gemma3"), tmp_path, is_trainable=True, low_cpu_mem_usage=not form["reparam_joint_kv"]
        )
    torch.testing.assert_close(logits(resumed), logits(model), atol=5e-5, rtol=1e-4)
    assert not torch.allclose(training_step(resumed), logits(model), atol=1e-4)


def test_which_states_share_a_trunk():
    shapes = [([2, 5, 8], [2, 5, 8]), ([2, 5, 8], [1, 5, 4])]
    expected = {
        (True, True): [[0, 1, 2, 3]],
        (True, False): [[0, 2], [1, 3]],
        (False, True): [[0, 1], [2, 3]],
        (False, False): [[0], [1], [2], [3]],
    }
    for (shared, joint), groups in expected.items():
        config = PrefixExtConfig(reparam="mlp", reparam_shared_trunk=shared, reparam_joint_kv=joint)
        mlp = PrefixMLP(config, shapes)
        assert mlp.groups == groups
        outputs = mlp()
        assert [[list(state.shape) for state in kv] for kv in outputs] == [list(pair) for pair in shapes]
        outputs[1].value.sum().backward()
        reached = [any(p.grad.any() for p in trunk.parameters()) for trunk in mlp.trunks]
        assert reached == [3 in group for group in groups]


@pytest.mark.parametrize("activation", sorted(ACT2FN))
def test_every_activation_of_transformers(activation):
    config = PrefixExtConfig(reparam="mlp", reparam_activation=activation)
    mlp = PrefixMLP(config, [([2, 5, 8], [2, 5, 8])])
    mlp()[0].key.sum().backward()
    assert all(p.grad.isfinite().all() for p in mlp.parameters())


@pytest.mark.parametrize(
    "settings", [{"reparam_hidden_size": 4}, {"num_virtual_tokens": 90, "reparam_activation": "linear"}]
)
def test_an_mlp_too_small_for_its_initialisation_is_refused(settings, llama):
    with pytest.raises(ValueError, match="`reparam_hidden_size` must be well above"):
        with_prefix(llama, reparam="mlp", reparam_residual=False, **settings)
    assert not any("prefix_ext" in name for name, _ in llama.named_modules())


def test_a_longer_prefix_is_still_exact_in_a_plain_mlp():
    flat = with_prefix(tiny_model("llama"), num_virtual_tokens=200)
    plain = with_prefix(tiny_model("llama"), num_virtual_tokens=200, reparam="mlp", reparam_residual=False)
    expected = prefix_kv(flat)
    for name, kv in prefix_kv(plain).items():
        torch.testing.assert_close(kv, expected[name], atol=2e-5, rtol=1e-5)


def test_the_number_of_trained_numbers_is_as_documented():
    """By the formula of the page on memory."""
    p, latent, width = 7, 12, 24
    model = with_prefix(
        tiny_model("llama"), num_virtual_tokens=p, reparam="mlp", reparam_latent_size=latent, reparam_hidden_size=width
    )
    config = model.get_base_model().config
    per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    expected = p * latent + (latent + 1) * width + (width + 1) * per_token
    assert sum(each.numel() for each in model.parameters() if each.requires_grad) == expected
