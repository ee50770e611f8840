"""What trains besides a prefix and belongs to its adapter: token embeddings and whole modules."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from helpers.prefixed import perturb
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig

IDS = random_ids(3, 9)
IDS[:, 2], IDS[:, 4] = 5, 7


def config(**options):
    return PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, init_std=1.0, **options)


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=IDS, **options).logits


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request):
    model = tiny_model("llama", tie_word_embeddings=request.param)
    model.tie_weights()
    return model


@pytest.fixture
def model(base):
    """Two adapters that train embeddings of different tokens."""
    model = get_peft_model(copy.deepcopy(base), config(trainable_token_indices=[5, 6]), adapter_name="one")
    model.add_adapter("two", config(trainable_token_indices=[7, 5]))
    perturb(model)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.normal_()
    return model.eval()


def test_each_adapter_has_its_tokens(model, base, tmp_path):
    model.save_pretrained(tmp_path)
    for name in ("one", "two"):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        assert torch.equal(logits(loaded), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


def test_rows_of_a_batch_have_the_tokens_of_their_adapter(model, base):
    names = ["two", "__base__", "one"]
    mixed = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        expected = logits(base if name == "__base__" else model)
        torch.testing.assert_close(mixed[row], expected[row], atol=2e-5, rtol=1e-4)


def test_unload_removes_trained_tokens(model, base):
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), logits(base))
    assert unloaded.state_dict().keys() == base.state_dict().keys()


def test_unload_keeps_what_other_adapters_train():
    lora = get_peft_model(tiny_model("llama"), LoraConfig(modules_to_save=["lm_head"]), adapter_name="tone")
    perturb(lora)
    expected = logits(lora.eval())
    both = get_peft_model(lora, config(modules_to_save=["lm_head"]), adapter_name="task")
    assert not torch.equal(logits(both.eval()), expected)
    both.unload()
    lora.set_adapter("tone")
    assert torch.equal(logits(lora), expected)
