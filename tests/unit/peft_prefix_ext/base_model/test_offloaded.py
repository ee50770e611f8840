"""Offloaded models: prefixes train, save and load as on other models."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.prefixed import perturb, with_prefix
from helpers.tiny import random_ids, tiny_model

IDS = random_ids(2, 9)
FORMS = {"mlp": {"reparam": "mlp", "num_frozen_tokens": 2}, "flat": {"layers_to_train": [0, 2]}}
DEVICES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
DEVICES |= {"model.layers.2": "disk", "model.norm": "cpu", "lm_head": "disk"}


def on_cpu(folder):
    return cpu_offload(tiny_model("llama"), torch.device("cpu"))


def on_disk(folder):
    return disk_offload(tiny_model("llama"), folder / "offloaded", torch.device("cpu"))


def by_map(folder):
    tiny_model("llama").save_pretrained(folder / "base")
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=DEVICES, offload_folder=folder / "offloaded", dtype=torch.float32
    )


def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offload", [on_cpu, on_disk, by_map])
def test_equals_a_model_in_memory(offload, form, tmp_path):
    model, reference = (with_prefix(base, **FORMS[form]) for base in (offload(tmp_path), tiny_model("llama")))
    for each in (model, reference):
        torch.manual_seed(0)
        perturb(each)
        train(each)
    torch.testing.assert_close(logits(model), logits(reference))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")), logits(model))
    for settings in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(offload(tmp_path), tmp_path / "adapter", **settings)
        assert torch.equal(logits(loaded), logits(model))
        assert getattr(loaded.get_base_model(), "hf_device_map", None) == (DEVICES if offload is by_map else None)
    loaded = with_prefix(offload(tmp_path), **FORMS[form])
    loaded.load_adapter(tmp_path / "adapter", "default")
    assert torch.equal(logits(loaded), logits(model))
