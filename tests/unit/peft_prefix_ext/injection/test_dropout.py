"""Prefix dropout: in training only, with one mask per forward pass, also when checkpointing repeats a layer."""

from __future__ import annotations

import pytest
import torch

from helpers.prefixed import REPARAMS, perturb, with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext.injection.layer import PrefixExtLayer

IDS = random_ids(2, 9)


def used_kv(model, monkeypatch):
    """Returns the K/V that each layer used in one forward pass, by layer index and kind."""
    used = {}
    materialize = PrefixExtLayer.materialize

    def spy(self, *args, **kwargs):
        kv = materialize(self, *args, **kwargs)
        used.update({(self.index, kind): tensor.detach().clone() for kind, tensor in kv._asdict().items()})
        return kv

    with monkeypatch.context() as patch:
        patch.setattr(PrefixExtLayer, "materialize", spy)
        model(input_ids=IDS)
    return used


@pytest.mark.parametrize("form", REPARAMS)
def test_elements_are_dropped_in_training_only(form, llama, monkeypatch):
    settings = {"num_virtual_tokens": 60, "num_frozen_tokens": 10, "layers_to_train": [0, 1]}
    model = with_prefix(llama, prefix_dropout=0.25, **settings, **REPARAMS[form])
    whole = used_kv(model, monkeypatch)
    assert all((tensor != 0).all() for tensor in whole.values())
    model.train()
    torch.manual_seed(3)
    first, second = used_kv(model, monkeypatch), used_kv(model, monkeypatch)
    torch.manual_seed(3)
    again = used_kv(model, monkeypatch)
    for name, tensor in whole.items():
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name][:, :10], tensor[:, :10])  # frozen tokens
        if name[0] == 2:  # a layer that does not train
            assert torch.equal(first[name], tensor)
            continue
        dropped = first[name][:, 10:] == 0
        assert 0.2 < dropped.float().mean() < 0.3
        torch.testing.assert_close(first[name][:, 10:], tensor[:, 10:] / 0.75 * ~dropped)
        assert not torch.equal(first[name], second[name])
    assert not torch.equal(first[0, "key"] == 0, first[0, "value"] == 0)
    assert not torch.equal(first[0, "key"] == 0, first[1, "key"] == 0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2 has dropout itself
@pytest.mark.parametrize("form", REPARAMS)
def test_checkpointing_changes_no_gradient(name, form):
    model = with_prefix(tiny_model(name), prefix_dropout=0.3, num_frozen_tokens=1, **REPARAMS[form]).train()
    perturb(model, std=0.1)

    def gradients():
        model.zero_grad()
        torch.manual_seed(5)
        first, second = model(input_ids=IDS, labels=IDS).loss, model(input_ids=IDS[:, :5], labels=IDS[:, :5]).loss
        (first + second).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        actual = gradients()
        for key in expected:
            torch.testing.assert_close(actual[key], expected[key], atol=1e-6, rtol=1e-4, msg=f"{key} {reentrant}")
