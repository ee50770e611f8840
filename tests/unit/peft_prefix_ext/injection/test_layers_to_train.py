"""`layers_to_train`: all other layers stay at their initial K/V."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from helpers.prefixed import REPARAMS, prefix_kv, with_prefix
from helpers.tiny import random_ids, tiny_model

IDS = random_ids(2, 9)


def prefixed(form, **config):
    return with_prefix(tiny_model("llama"), layers_to_train=[0, 2], num_frozen_tokens=2, **REPARAMS[form], **config)


def train(model):
    """Runs two steps: heads that start at zero pass no gradient on in the first."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    torch.manual_seed(0)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("form", REPARAMS)
def test_only_these_layers_train_before_and_after_saving(form, tmp_path):
    initial = prefix_kv(with_prefix(tiny_model("llama")))
    model = train(prefixed(form, prefix_dropout=0.2))
    for name, kv in prefix_kv(model).items():
        if ".layers.1." in name:
            assert torch.equal(kv, initial[name])
        else:
            assert torch.equal(kv[:, :2], initial[name][:, :2])
            assert not torch.isclose(kv[:, 2:], initial[name][:, 2:]).all()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), logits(model))
    resumed = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert torch.equal(logits(resumed), logits(model))
    assert resumed.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert torch.equal(logits(train(resumed)), logits(train(model)))
    last = prefix_kv(resumed)
    assert all(torch.equal(last[name], initial[name]) for name in last if ".layers.1." in name)


def test_counts():
    def trained(**config):
        return with_prefix(tiny_model("llama"), num_frozen_tokens=2, **config).get_nb_trainable_parameters()[0]

    assert 3 * trained(layers_to_train=[1]) == trained() == 3 * 2 * (2 * 5 * 16)
    # An MLP has no outputs for the others.
    whole, part = trained(reparam="mlp"), trained(reparam="mlp", layers_to_train=[0, 2])
    assert whole - part == (256 + 1) * 2 * (2 * 16)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([1, 3], r"must be among the layers with a prefix, \[0, 1, 2\], got \[3\]"),
        ([-1], r"must be among the layers with a prefix, \[0, 1, 2\], got \[-1\]"),
        ([], r"`layers_to_train` must be a list of integers, got \[\]"),
        (1, "`layers_to_train` must be a list of integers, got 1"),
        (["0"], r"`layers_to_train` must be a list of integers, got \['0'\]"),
    ],
)
def test_unknown_layers_are_refused(layers, message, llama):
    with pytest.raises(ValueError, match=message):
        with_prefix(llama, layers_to_train=layers)
    assert not any("prefix_ext" in name for name, _ in llama.named_modules())
