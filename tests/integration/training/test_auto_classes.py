"""Adapters with the Auto classes of transformers and PEFT, and on models with other heads."""

from __future__ import annotations

import json

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers.prefixed import perturb, with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig, export_to_peft, read_prefix

IDS = random_ids(2, 7)


@pytest.fixture(params=["llama", "gpt2", "opt"])
def folder(request, tmp_path):
    """A base model and an adapter of it."""
    tiny_model(request.param).save_pretrained(tmp_path / "base")
    model = with_prefix(base_of(tmp_path), reparam="mlp", num_frozen_tokens=2)
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def base_of(folder, auto_class=AutoModelForCausalLM):
    return auto_class.from_pretrained(folder / "base").eval()


@torch.no_grad()
def hidden(model):
    model.eval()
    decoder = getattr(model, model.base_model_prefix, model)
    return decoder(input_ids=IDS).last_hidden_state


def expected(folder):
    return hidden(PeftModel.from_pretrained(base_of(folder), folder / "adapter").get_base_model())


def same(model, folder):
    torch.testing.assert_close(hidden(model), expected(folder), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(hidden(base_of(folder)), expected(folder), atol=1e-2)


def test_auto_classes_of_transformers(folder):
    same(AutoModelForCausalLM.from_pretrained(folder / "adapter"), folder)
    same(AutoModel.from_pretrained(folder / "adapter"), folder)
    model = base_of(folder)
    model.load_adapter(str(folder / "adapter"), "mine")
    same(model, folder)


def test_methods_of_transformers(folder, methods_of_transformers):
    model = base_of(folder)
    model.load_adapter(str(folder / "adapter"), "mine")
    assert model.active_adapters() == ["mine"]
    model.disable_adapters()
    assert torch.equal(hidden(model), hidden(base_of(folder)))
    model.enable_adapters()
    same(model, folder)
    model.delete_adapter("mine")
    assert torch.equal(hidden(model), hidden(base_of(folder)))


def test_auto_classes_of_peft(folder):
    same(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").get_base_model(), folder)
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "FEATURE_EXTRACTION"}))
    same(AutoPeftModelForFeatureExtraction.from_pretrained(folder / "adapter").get_base_model(), folder)


def test_a_relative_base_is_found_from_another_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with_prefix(AutoModelForCausalLM.from_pretrained("base/")).save_pretrained("ours")
    export_to_peft("ours", "stock")
    monkeypatch.chdir(folder.parent)
    for name in ("ours", "stock"):
        assert read_prefix(folder / name).base_model_name_or_path == str(folder / "base")
    AutoPeftModelForCausalLM.from_pretrained(folder / "ours")
    AutoModelForCausalLM.from_pretrained(folder / "ours")


def test_a_relative_base_of_transformers_own_methods(folder, monkeypatch, methods_of_transformers):
    monkeypatch.chdir(folder)
    model = AutoModelForCausalLM.from_pretrained("base")
    model.add_adapter(PrefixExtConfig(num_virtual_tokens=3))
    model.save_pretrained("ours")
    monkeypatch.chdir(folder.parent)
    AutoModelForCausalLM.from_pretrained(folder / "ours")


def test_names_on_the_hub_stay_as_they_are(folder, monkeypatch):
    monkeypatch.chdir(folder)
    model = base_of(folder)
    model.name_or_path = "owner/name"
    with_prefix(model).save_pretrained("saved")
    assert read_prefix("saved").base_model_name_or_path == "owner/name"
    (folder / "owner" / "name").mkdir(parents=True)  # which transformers prefers to the Hub's
    again = base_of(folder)
    again.name_or_path = "owner/name"
    with_prefix(again).save_pretrained("again")
    assert read_prefix("again").base_model_name_or_path == str(folder / "owner" / "name")


def test_without_a_task_type(folder):
    model = get_peft_model(base_of(folder, AutoModel), PrefixExtConfig(num_virtual_tokens=4, init_std=1.0))
    model.save_pretrained(folder / "bare")
    loaded = AutoPeftModel.from_pretrained(folder / "bare")
    assert torch.equal(hidden(loaded.get_base_model()), hidden(model.get_base_model()))
    # and from the bare decoder on to a language model
    config = PeftConfig.from_pretrained(folder / "bare")
    config.task_type = "CAUSAL_LM"
    other = PeftModel.from_pretrained(base_of(folder), folder / "bare", config=config)
    assert torch.equal(hidden(other.get_base_model()), hidden(model.get_base_model()))
    other.save_pretrained(folder / "again")
    names = {
        row["module"] for row in json.loads((folder / "again" / "adapter_config.json").read_text())["prefix_layers"]
    }
    assert names <= {name for name, _ in base_of(folder).named_modules()}
    assert read_prefix(folder / "again").num_virtual_tokens == 4


@pytest.mark.parametrize("is_trainable", [False, True])
def test_models_with_other_heads(folder, is_trainable):
    config = PeftConfig.from_pretrained(folder / "adapter")
    # With its task type, PEFT wants the classifier's head from the adapter, too.
    for auto_class, task_type in ((AutoModel, "FEATURE_EXTRACTION"), (AutoModelForSequenceClassification, None)):
        config.task_type = task_type
        model = PeftModel.from_pretrained(
            base_of(folder, auto_class), folder / "adapter", config=config, is_trainable=is_trainable
        )
        same(model.get_base_model(), folder)
        same_shape = with_prefix(base_of(folder, auto_class), task_type=task_type)
        same_shape.load_adapter(folder / "adapter", "default")  # on to an adapter that is there
        same(same_shape.get_base_model(), folder)


def test_from_a_classifier(folder):
    model = with_prefix(base_of(folder, AutoModelForSequenceClassification), task_type="SEQ_CLS")
    model.save_pretrained(folder / "classifier")
    config = PeftConfig.from_pretrained(folder / "classifier")
    config.task_type = "CAUSAL_LM"
    other = PeftModel.from_pretrained(base_of(folder), folder / "classifier", config=config)
    assert torch.equal(hidden(other.get_base_model()), hidden(model.get_base_model()))


def test_state_dicts_of_models_that_nothing_wraps(folder, methods_of_transformers):
    model = base_of(folder)
    model.add_adapter(PrefixExtConfig(num_virtual_tokens=3, init_std=1.0, reparam="mlp"))
    perturb(model)
    state = get_peft_model_state_dict(model)
    other = base_of(folder)
    other.add_adapter(PrefixExtConfig(num_virtual_tokens=3, init_std=1.0, reparam="mlp"))
    set_peft_model_state_dict(other, state)
    assert torch.equal(hidden(other), hidden(model))


def test_training_with_transformers_own_methods(folder, methods_of_transformers):
    model = base_of(folder)
    model.add_adapter(PrefixExtConfig(num_virtual_tokens=3, init_std=1.0, reparam="mlp"))
    perturb(model)
    assert all("prefix_ext" in name for name, p in model.named_parameters() if p.requires_grad)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(folder / "saved")
    assert read_prefix(folder / "saved").num_virtual_tokens == 3
    again = AutoModelForCausalLM.from_pretrained(folder / "saved")
    torch.testing.assert_close(hidden(again), hidden(model), atol=1e-5, rtol=1e-5)


def test_transformers_cannot_resume_a_reparameterization(folder):
    model = with_prefix(base_of(folder), reparam="mlp")
    perturb(model)
    model.save_pretrained(folder / "mlp")
    resumed = base_of(folder)
    resumed.load_adapter(str(folder / "mlp"), is_trainable=True)
    with pytest.raises(ValueError, match=r"which transformers cannot load to continue training|never loaded"):
        resumed(input_ids=IDS)


def test_weights_of_another_base_are_refused_for_an_existing_adapter(tmp_path):
    with_prefix(tiny_model("llama", rope_parameters={"rope_theta": 500.0, "rope_type": "default"})).save_pretrained(
        tmp_path
    )
    model = with_prefix(tiny_model("llama"))
    before = hidden(model.get_base_model())
    with pytest.raises(ValueError, match=r"trained on another base model .*rope_theta is 500.0 in the adapter"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(hidden(model.get_base_model()), before)
