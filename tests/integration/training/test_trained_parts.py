"""Checkpoints with trained tensors only, as written by DeepSpeed's `exclude_frozen_parameters` or user callbacks."""

from __future__ import annotations

import pytest
import torch

from helpers.prefixed import REPARAMS, perturb, with_prefix
from helpers.tiny import random_ids, tiny_model
from helpers.tiny_seq2seq import tiny_encoder_decoder

IDS = random_ids(2, 9)
SETTINGS = {"all": {}, "frozen tokens": {"num_frozen_tokens": 2}, "two layers": {"layers_to_train": [0, 2]}}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def prefixed(form, settings, seed):
    return with_prefix(tiny_model("llama"), seed=seed, **REPARAMS[form], **SETTINGS[settings])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", REPARAMS)
def test_without_frozen_parameters(form, settings):
    model = prefixed(form, settings, seed=1)
    perturb(model)
    state = model.state_dict()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            del state[name]
    resumed = prefixed(form, settings, seed=2)
    resumed.load_state_dict(state, strict=False)
    assert torch.equal(logits(resumed), logits(model))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", REPARAMS)
def test_without_buffers(form, settings):
    model = prefixed(form, settings, seed=1)
    perturb(model)
    state = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    resumed = prefixed(form, settings, seed=2)
    before = logits(resumed)
    if settings == "all" and form != "residual":  # nothing else belongs to the prefix
        resumed.load_state_dict(state, strict=False)
        assert torch.equal(logits(resumed), logits(model))
        return
    with pytest.raises(RuntimeError, match=r"what adapter 'default' trains, but not .*: save the model's buffers, too"):
        resumed.load_state_dict(state, strict=False)
    assert torch.equal(logits(resumed), before)


def test_of_another_stack():
    """What does not train may be all in the encoder, and what trains in the decoder."""
    config = {"task_type": "SEQ_2_SEQ_LM", "encoder_prefix": True, "layers_to_train": [0]}
    model, resumed = (with_prefix(tiny_encoder_decoder("t5"), seed=seed, **config) for seed in (1, 2))
    state = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(RuntimeError, match="save the model's buffers, too"):
        resumed.load_state_dict(state, strict=False)
    resumed.load_state_dict(state | dict(model.named_buffers()), strict=False)


def test_other_adapters_and_parts_are_not_required():
    model = prefixed("residual", "all", seed=1)
    model.add_adapter("second", model.peft_config["default"])
    state = {name: tensor for name, tensor in model.state_dict().items() if ".default" in name}
    model.load_state_dict(state, strict=False)
    model.load_state_dict({name: state[name] for name in state if "reparam" not in name}, strict=False)
    model.unload().load_state_dict({}, strict=False)
