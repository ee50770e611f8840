"""Prefixes of quantized base models train, generate, save and load."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from helpers.prefixed import perturb
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig, read_prefix

IDS = random_ids(2, 6)


def quantization(kind):
    if kind == "torchao int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "bitsandbytes 8-bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(params=["bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8"])
def load(request, tmp_path):
    """Loads a quantized base."""
    tiny_model("llama", hidden_size=128, intermediate_size=128, head_dim=32).save_pretrained(tmp_path / "base")
    settings = {"quantization_config": quantization(request.param), "dtype": torch.float32}
    return lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base", **settings)


@pytest.mark.parametrize("reparam", ["none", "mlp"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_quantized_base(load, reparam, prepared, tmp_path):
    base = prepare_model_for_kbit_training(load()) if prepared else load()
    config = PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, reparam=reparam, init_std=0.5)
    model = get_peft_model(base, config)
    perturb(model, 0.1)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trainable
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trainable)
    torch.optim.SGD(trainable, lr=0.1).step()

    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False}
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-2)
        assert torch.equal(loaded.generate(input_ids=IDS, **options), model.generate(input_ids=IDS, **options))
    assert read_prefix(tmp_path / "adapter").num_virtual_tokens == 5
