"""Modules of the base model that are trained and saved with a prefix, whatever their names."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from helpers.prefixed import perturb, with_prefix
from helpers.tiny import random_ids, tiny_model
from helpers.tiny_seq2seq import tiny_encoder_decoder
from peft_prefix_ext import PrefixCheckpointError, PrefixExtConfig, read_prefix

IDS = random_ids(2, 9)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("name", "module", "held"),
    [
        ("llama", "layers.1", "model.layers.1"),
        ("llama", "self_attn", "model.layers.0.self_attn"),
        ("llama", "model", "model"),
        ("gpt2", "attn", "transformer.h.0.attn"),
        ("gemma3n", "layers.3", "model.layers.3"),  # attends to the K/V of another layer
        ("t5", "decoder", "decoder"),
        ("bart", "decoder.embed_positions", "model.decoder.embed_positions"),
    ],
)
def test_modules_with_a_prefix_in_them_are_refused(name, module, held):
    is_decoder = name not in ("t5", "bart")
    model = tiny_model(name) if is_decoder else tiny_encoder_decoder(name)
    config = PrefixExtConfig(
        task_type="CAUSAL_LM" if is_decoder else "SEQ_2_SEQ_LM", num_virtual_tokens=4, modules_to_save=[module]
    )
    before = model.state_dict().keys()
    with pytest.raises(
        ValueError, match=rf"must not be modules with a prefix in them, got .* of which '{held}' is one"
    ):
        get_peft_model(model, config)
    assert model.state_dict().keys() == before


def test_modules_with_a_prefix_are_refused_for_adapters_on_top(llama):
    model = with_prefix(llama)
    with pytest.raises(ValueError, match="must not be modules with a prefix in them"):
        model.add_adapter("second", PrefixExtConfig(task_type="CAUSAL_LM", modules_to_save=["layers.1"]))
    around = LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], modules_to_save=["layers.1"])
    with pytest.raises(ValueError, match="must not be modules with a prefix in them"):
        get_peft_model(model.get_base_model(), around, "lora")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], modules_to_save=["norm"])
    both = get_peft_model(model.get_base_model(), lora, "lora")
    with pytest.raises(ValueError, match="must not be modules with a prefix in them"):
        both.add_adapter("around", around)


@pytest.mark.parametrize("module", ["q_proj", "mlp", "norm"])
def test_modules_besides_and_within_attention(module, tmp_path):
    model = with_prefix(tiny_model("llama"), modules_to_save=[module])
    perturb(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), logits(model))


class Scaled(nn.Module):
    """A module of one's own, with a parameter that is called as ours are."""

    def __init__(self):
        super().__init__()
        self.prefix_ext_key = nn.Parameter(torch.ones(64))

    def forward(self, hidden):
        return hidden * self.prefix_ext_key


def with_own_names():
    model = tiny_model("llama")
    modules = {"prefix_ext_scale": Scaled(), "prefix_ext": nn.LayerNorm(64), "head": model.lm_head}
    model.lm_head = nn.Sequential(OrderedDict(modules))
    return model


@pytest.mark.parametrize("module", ["prefix_ext_scale", "lm_head.prefix_ext", "lm_head"])
def test_modules_named_like_parts_of_a_prefix(module, tmp_path):
    model = with_prefix(with_own_names(), reparam="mlp", modules_to_save=[module])
    perturb(model)
    model.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        again = PeftModel.from_pretrained(with_own_names(), tmp_path, is_trainable=is_trainable)
        assert torch.equal(logits(again), logits(model))
        saved, loaded = (
            {name: tensor for name, tensor in one.state_dict().items() if "modules_to_save" in name}
            for one in (model, again)
        )
        assert saved
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    with pytest.raises(PrefixCheckpointError, match="holds weights of the base model beside the prefix"):
        read_prefix(tmp_path)


def test_attention_in_a_module_named_like_a_part_of_a_prefix(tmp_path):
    class Named(type(tiny_model("llama"))):
        base_model_prefix = "prefix_ext_decoder"

        def __init__(self, config):
            super().__init__(config)
            self.prefix_ext_decoder = self.model
            del self.model

        @property
        def model(self):
            return self.prefix_ext_decoder

    def base():
        weights = tiny_model("llama").state_dict()
        model = Named(tiny_model("llama").config).eval()
        model.load_state_dict({name.replace("model.", "prefix_ext_decoder.", 1): weights[name] for name in weights})
        return model

    model = with_prefix(base(), reparam="mlp")
    perturb(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))
    before = logits(model)
    model.add_adapter("second", PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.delete_adapter("second")
    assert not any("second" in name for name in model.state_dict())
    assert torch.equal(logits(model), before)
