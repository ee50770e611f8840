"""A loaded adapter is the saved one, to the bit, and continues its training as if it had never been saved."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from helpers.prefixed import perturb, trained_model, with_prefix
from helpers.tiny import random_ids, tiny_config, tiny_model
from peft_prefix_ext import PrefixCheckpointError, PrefixExtConfig, read_prefix

IDS = random_ids(2, 9)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("reparam", ["none", "mlp"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "falcon"])
def test_round_trip_is_bit_exact(name, reparam, tmp_path):
    model = trained_model(name, reparam=reparam)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any("reparam" in key for key in loaded.state_dict())
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_model(name), tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    resumed = PeftModel.from_pretrained(tiny_model(name), tmp_path, is_trainable=True)
    assert torch.equal(logits(resumed), logits(model))
    ours, theirs = model.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {n for n, p in resumed.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def step(model):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return logits(model)


def test_training_continues_as_if_never_saved(tmp_path):
    model = trained_model(reparam="mlp", reparam_num_layers=2)
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert torch.equal(step(resumed), step(model))


def test_without_the_mlp_training_continues_from_the_kv(tmp_path):
    model = trained_model(reparam="mlp", save_reparam=False)
    model.save_pretrained(tmp_path)
    assert all(
        key.endswith(("prefix_ext_key", "prefix_ext_value"))
        for key in load_file(tmp_path / "adapter_model.safetensors")
    )
    with pytest.warns(UserWarning, match="has no reparameterization"):
        resumed = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert torch.equal(logits(resumed), logits(model))
    assert not torch.equal(step(resumed), logits(model))


def test_auto_class_second_adapter_and_low_memory(tmp_path):
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    model = trained_model(reparam="mlp")
    model.save_pretrained(tmp_path / "one")
    config = tmp_path / "one" / "adapter_config.json"
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{tmp_path}/base"')
    )
    expected = logits(model)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one")), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "one", low_cpu_mem_usage=True)), expected)
    resumed = PeftModel.from_pretrained(
        tiny_model("llama"), tmp_path / "one", is_trainable=True, low_cpu_mem_usage=True
    )
    # PEFT leaves these weights where the file was mapped, and matrix products may round by how memory is aligned.
    torch.testing.assert_close(logits(resumed), expected, atol=1e-5, rtol=1e-5)
    other = with_prefix(tiny_model("llama"), seed=9, num_virtual_tokens=3)
    other.load_adapter(tmp_path / "one", adapter_name="one")
    other.set_adapter("one")
    assert torch.equal(logits(other), expected)


def test_a_saved_config_alone_is_no_adapter(tmp_path):
    trained_model().save_pretrained(tmp_path)
    model = get_peft_model(tiny_model("llama"), PrefixExtConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="its weights were never loaded"):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match="its weights were never loaded"):
        model.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    model.load_state_dict(loaded.state_dict())
    assert torch.equal(logits(model), logits(loaded))


def test_a_classifier_keeps_its_head_and_cannot_be_read_as_a_prefix(tmp_path):
    def classifier():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=3))

    model = get_peft_model(classifier(), PrefixExtConfig(task_type="SEQ_CLS", num_virtual_tokens=4, init_std=1.0))
    perturb(model)
    assert any("score" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(classifier(), tmp_path)), logits(model))
    with pytest.raises(PrefixCheckpointError, match="holds weights of the base model beside the prefix"):
        read_prefix(tmp_path)
