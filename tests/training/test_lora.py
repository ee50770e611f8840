"""A prefix on top of LoRA, and LoRA on top of a prefix: both train, both are saved, both load again."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from prefixed import perturb
from safetensors.torch import load_file
from tiny import random_ids, tiny_model

from peft_prefix_ext import PrefixExtConfig, read_prefix

IDS = random_ids(2, 9)
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
PREFIX = PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, init_std=1.0, reparam="mlp")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trainable(model):
    return {
        name.rpartition("prefix_ext_" if "prefix_ext_" in name else "lora_")[1]
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.fixture
def lora(llama):
    torch.manual_seed(0)
    model = get_peft_model(llama, LORA)
    perturb(model)
    return model


@pytest.fixture
def both(lora):
    with pytest.warns(UserWarning, match="second time"):
        model = get_peft_model(lora, PREFIX, adapter_name="prefix")
    perturb(model)
    return model


def test_both_train_or_lora_stays_frozen(lora, both):
    assert trainable(both) == {"lora_", "prefix_ext_"}
    both.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in both.parameters() if p.requires_grad)
    lora.set_requires_grad("default", False)
    assert trainable(both) == {"prefix_ext_"}


def test_lora_that_was_loaded_stays_frozen(lora, tmp_path):
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    both = get_peft_model(loaded, PREFIX, adapter_name="prefix")
    assert trainable(both) == {"prefix_ext_"}


@pytest.mark.parametrize("handle", ["lora", "both"])
def test_both_are_saved_and_loaded(handle, lora, both, tmp_path):
    expected = logits(both)
    assert torch.equal(logits(lora), expected)  # one base under both
    {"lora": lora, "both": both}[handle].save_pretrained(tmp_path)
    assert all(".lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert read_prefix(tmp_path / "prefix").num_virtual_tokens == 5

    first = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    second = PeftModel.from_pretrained(first, tmp_path / "prefix", adapter_name="prefix")
    torch.testing.assert_close(logits(second), expected, atol=1e-5, rtol=1e-5)
    resumed = PeftModel.from_pretrained(
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True),
        tmp_path / "prefix",
        adapter_name="prefix",
        is_trainable=True,
    )
    assert trainable(resumed) == {"lora_", "prefix_ext_"}
    torch.testing.assert_close(logits(resumed), expected, atol=1e-5, rtol=1e-5)


def test_each_alone(lora, both, tmp_path):
    alone = logits(get_peft_model(tiny_model("llama"), LORA))
    both.save_pretrained(tmp_path)
    with both.disable_adapter():
        assert torch.equal(logits(both), logits(tiny_model("llama")))
    prefix_alone = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "prefix")
    assert not torch.allclose(logits(prefix_alone), logits(both), atol=1e-2)
    both.unload()
    assert list(lora.peft_config) == ["default"]
    assert not torch.allclose(logits(lora), alone, atol=1e-2)
    fresh = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(lora), logits(fresh))


def test_lora_merges_under_the_prefix(lora, both):
    expected = logits(both)
    lora.merge_and_unload()
    torch.testing.assert_close(logits(both), expected, atol=1e-4, rtol=1e-4)


def test_lora_on_top_of_a_prefix(llama, tmp_path):
    prefix = get_peft_model(llama, PREFIX)
    perturb(prefix)
    both = get_peft_model(prefix.get_base_model(), LORA, adapter_name="lora")
    assert trainable(both) == {"lora_", "prefix_ext_"}
    perturb(both)
    expected = logits(both)
    both.save_pretrained(tmp_path)
    first = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    second = PeftModel.from_pretrained(first.get_base_model(), tmp_path / "lora", adapter_name="lora")
    torch.testing.assert_close(logits(second), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_with_and_without_prefix_on_lora(lora, both):
    both.eval()
    bare = logits(tiny_model("llama"))
    mixed = both(input_ids=IDS, adapter_names=["prefix", "__base__"]).logits
    torch.testing.assert_close(mixed[:1], logits(both)[:1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mixed[1], bare[1], atol=1e-2)  # LoRA is at work in every row
    both.unload()
    torch.testing.assert_close(mixed[1:], logits(lora)[1:], atol=1e-5, rtol=1e-4)


def test_what_cannot_be_says_so(lora, both):
    with pytest.raises(ValueError, match="'default' is of type LORA, not a prefix"):
        both.set_adapter("default")
    with pytest.raises(ValueError, match="'default' is of type LORA, not a prefix"):
        both.delete_adapter("default")
    before = logits(both)
    with pytest.raises(ValueError, match="has an adapter 'default' of type LORA already"):
        get_peft_model(lora, PREFIX)
    assert torch.equal(logits(both), before)
    prompt = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="cannot stand on an adapter of type PROMPT_TUNING"):
        get_peft_model(prompt, PREFIX)
