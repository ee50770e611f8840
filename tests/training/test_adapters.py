"""Several adapters on one model, switched, disabled and taken off again, as PEFT users do."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from prefixed import with_prefix
from tiny import random_ids, tiny_model

from peft_prefix_ext import PrefixExtConfig


@pytest.fixture
def model(llama):
    model = with_prefix(llama, num_virtual_tokens=5)
    model.add_adapter(
        "long", PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=11, init_std=1.0, reparam="mlp")
    )
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=random_ids(2, 6)).logits


def test_switching_and_disabling(model):
    base = logits(tiny_model("llama"))
    first = logits(model)
    model.set_adapter("long")
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_second_adapter_of_text_is_read_off_the_base_alone(word_tokenizer):
    config = {
        "init": "text",
        "init_text": "w5 w17 w40",
        "tokenizer_name_or_path": word_tokenizer,
        "num_virtual_tokens": 4,
    }
    alone = logits(with_prefix(tiny_model("llama"), **config))
    model = with_prefix(tiny_model("llama"))
    model.add_adapter("text", PrefixExtConfig(task_type="CAUSAL_LM", **config))
    model.set_adapter("text")
    assert torch.equal(logits(model), alone)


def test_only_the_active_adapter_trains(model):
    def trainable():
        return {name for name, p in model.named_parameters() if p.requires_grad}

    assert trainable()
    assert all(name.endswith(".default") for name in trainable())
    model.set_adapter("long")
    assert trainable()
    assert all(".prefix_ext_reparam.long." in name for name in trainable())
    with model.disable_adapter():
        assert not trainable()
    assert trainable()


def test_status_and_deletion(model):
    status = model.get_model_status()
    assert status.available_adapters == ["default", "long"]
    assert status.active_adapters == ["default"]
    first = logits(model)
    model.delete_adapter("long")
    assert model.get_model_status().available_adapters == ["default"]
    assert not any("long" in name for name in model.state_dict())
    assert torch.equal(logits(model), first)


def test_unload_gives_the_base_model_back(model):
    base = model.unload()
    assert torch.equal(logits(base), logits(tiny_model("llama")))
    assert not any("prefix_ext" in name for name, _ in base.named_modules())
    assert logits(get_peft_model(base, PrefixExtConfig(task_type="CAUSAL_LM"))).shape[0] == 2


def test_a_deep_copy_is_independent(model):
    before = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "prefix_ext_" in name:
                parameter.add_(1.0)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_what_is_not_supported_says_so(model):
    with pytest.raises(ValueError, match="one active adapter at a time"):
        model.base_model.set_adapter(["default", "long"])
    with pytest.raises(ValueError, match="`adapter_names` is not supported"):
        model(input_ids=random_ids(2, 4), adapter_names=["default", "long"])
    with pytest.raises(ValueError, match="nothing to merge"):
        model.merge_and_unload()


def test_one_config_serves_several_models(llama):
    config = PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(llama, config)
    other = get_peft_model(tiny_model("qwen3"), config)
    assert logits(other).isfinite().all()


@pytest.mark.parametrize("name", ["mamba", "t5", "llama4_text"])
def test_unsupported_models_are_refused_in_one_sentence(name):
    import transformers

    models = {
        "mamba": lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
        ),
        "llama4_text": lambda: transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(
                vocab_size=32,
                hidden_size=32,
                intermediate_size=32,
                intermediate_size_mlp=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                num_local_experts=2,
                pad_token_id=0,
            )
        ),
    }
    model = models[name]()
    with pytest.raises(ValueError, match=r"no attention layer|not support"):
        get_peft_model(model, PrefixExtConfig(task_type="CAUSAL_LM"))
    assert not any("prefix_ext" in key for key in model.state_dict())
