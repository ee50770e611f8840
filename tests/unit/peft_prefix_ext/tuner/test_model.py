"""Several adapters on one model: switched, disabled, deleted and unloaded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from helpers.prefixed import perturb, with_prefix
from helpers.tiny import random_ids, tiny_model
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


def test_a_second_adapter_of_text_is_computed_by_the_base_alone(word_tokenizer):
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


def test_unload_returns_the_base_model(model):
    base = model.unload()
    assert torch.equal(logits(base), logits(tiny_model("llama")))
    assert not any("prefix_ext" in name for name, _ in base.named_modules())
    assert logits(get_peft_model(base, PrefixExtConfig(task_type="CAUSAL_LM"))).shape[0] == 2


def test_a_deep_copy_is_independent(model):
    before = logits(model)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), before)
    with torch.no_grad():
        for name, parameter in clone.named_parameters():
            if "prefix_ext_" in name:
                parameter.add_(1.0)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(clone), before)


def test_unsupported_methods_are_refused(model):
    with pytest.raises(ValueError, match="one active adapter at a time"):
        model.base_model.set_adapter(["default", "long"])
    with pytest.raises(ValueError, match="nothing to merge"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="nothing to merge"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="not weights that can be added"):
        model.add_weighted_adapter(["default", "long"], [0.5, 0.5], "sum")


def test_one_config_serves_several_models(llama, tmp_path):
    config = PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, init_std=1.0)
    first = get_peft_model(llama, config).eval()
    get_peft_model(tiny_model("qwen3"), config).save_pretrained(tmp_path / "qwen3")
    first.save_pretrained(tmp_path / "llama")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "llama")), logits(first))
    PeftModel.from_pretrained(tiny_model("qwen3"), tmp_path / "qwen3")


def test_a_failed_second_wrap_keeps_the_first(llama):
    model = with_prefix(llama, reparam="mlp")
    before = logits(model)
    with (
        pytest.raises(ValueError, match="does not say where it came from"),
        pytest.warns(UserWarning, match="second time"),
    ):
        with_prefix(llama, init="text", init_text="x")
    assert torch.equal(logits(model), before)
    assert model.peft_config["default"].reparam == "mlp"


def refused() -> dict[str, tuple]:
    tiny = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    t = transformers
    return {
        "mamba": (t.MambaForCausalLM, t.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)),
        "bert": (t.BertForSequenceClassification, t.BertConfig(**tiny, num_attention_heads=2)),
        "bidirectional llama": (t.LlamaForCausalLM, t.LlamaConfig(**tiny, **heads, is_causal=False)),
        "roberta": (t.RobertaForCausalLM, t.RobertaConfig(**tiny, num_attention_heads=2, is_decoder=True)),
    }


@pytest.mark.parametrize("name", list(refused()))
def test_unsupported_models_are_refused_in_one_sentence(name):
    model_class, config = refused()[name]
    model = model_class(config)
    with pytest.raises(ValueError, match=r"no attention layer|not support"):
        get_peft_model(model, PrefixExtConfig(num_virtual_tokens=4))
    assert not any("prefix_ext" in key for key in model.state_dict())


def test_a_prefix_as_long_as_the_positions_is_refused(llama):
    with pytest.raises(ValueError, match="must be < the 512 positions of LlamaForCausalLM, got 512"):
        with_prefix(llama, num_virtual_tokens=512)


@pytest.mark.parametrize("second", [{"reparam": "mlp"}, {"reparam": "none"}, {"num_virtual_tokens": 12}])
def test_get_peft_model_twice_starts_anew(llama, second):
    first = with_prefix(llama, reparam="mlp", num_frozen_tokens=2)
    perturb(first)
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        again = with_prefix(llama, **second)
    fresh = with_prefix(tiny_model("llama"), **second)
    assert torch.equal(logits(again), logits(fresh))
    assert again.state_dict().keys() == fresh.state_dict().keys()


def test_copies_after_training(llama):
    model = with_prefix(llama, reparam="mlp").train()
    model(input_ids=random_ids(2, 6), labels=random_ids(2, 6)).loss.backward()
    clone = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(logits(clone.eval()), logits(model.eval()))


def test_injection_keeps_training_modes(llama):
    llama.train()
    llama.model.layers[1].eval()
    before = {name: module.training for name, module in llama.named_modules()}
    get_peft_model(llama, PrefixExtConfig(task_type="CAUSAL_LM"))
    assert all(llama.get_submodule(name).training == mode for name, mode in before.items())


@torch.no_grad()
def test_evaluation_follows_the_weights_and_autocast(llama):
    model = with_prefix(llama, reparam="mlp")
    perturb(model)
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    assert torch.equal(logits(model), exact)
    for parameter in model.get_base_model().model.prefix_ext.parameters():
        parameter.data.copy_(parameter.data * 2)
    changed = logits(model)
    assert not torch.allclose(changed, exact, atol=1e-2)
    assert torch.equal(logits(copy.deepcopy(model)), changed)
