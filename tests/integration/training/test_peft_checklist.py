"""What PEFT's own suite asserts for all methods (tests/testing_common.py), as far as it applies to a prefix."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

from helpers.prefixed import perturb, with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig

IDS = random_ids(2, 7)
CONFIGS = [{}, {"reparam": "mlp"}, {"num_frozen_tokens": 2}]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def another(**settings):
    return PrefixExtConfig(task_type="CAUSAL_LM", **{"num_virtual_tokens": 4, "init_std": 1.0, **settings})


@pytest.fixture(params=CONFIGS, ids=str)
def model(request, llama):
    model = with_prefix(llama, **request.param)
    perturb(model)
    return model


def test_state_dict_round_trip_within_memory(model):
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    assert not any("default" in name for name in state)
    expected = logits(model)
    perturb(model)
    assert not torch.allclose(logits(model), expected, atol=1e-2)
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(model), expected)


def test_selected_adapters(model, tmp_path):
    model.add_adapter("other", another())
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "other"}
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])
    model.set_adapter("other")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "other")
    assert torch.equal(logits(loaded), logits(model))


def test_pickled_weights(model, tmp_path):
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), logits(model))


def test_torch_save_of_the_whole_model(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), logits(model))


def test_deep_copy_of_a_loaded_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(model))


def test_only_the_adapter_trains_and_the_base_stays(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("prefix_ext" in name for name in trainable)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trainable


def test_deleting_the_active_and_an_inactive_adapter(model):
    expected = logits(model)
    model.add_adapter("other", another())
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected)
    model.add_adapter("other", another())
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model), logits(tiny_model("llama")))
    model.add_adapter("default", another())
    model.set_adapter("default")
    assert not torch.allclose(logits(model), logits(tiny_model("llama")), atol=1e-2)


def test_adding_an_adapter_changes_no_requires_grad(model):
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.add_adapter("other", another(reparam="mlp"))
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in after.keys() - before.keys())
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("other", another())


def test_inference_mode_and_requires_grad(model):
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.set_adapter("default", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_requires_grad("default")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    model.set_requires_grad("default", requires_grad=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_status(model):
    model.add_adapter("other", another())
    status = model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "other"]
    assert status.peft_types == {"default": "PREFIX_EXT", "other": "PREFIX_EXT"}
    assert status.adapter_model_type == "PrefixExtModel"
    names = [layer.name for layer in model.get_layer_status()]
    assert names == [
        *(f"model.model.layers.{index}.self_attn.prefix_ext" for index in range(3)),
        "model.model.prefix_ext",
    ]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


@pytest.mark.parametrize("name", ["prefix", "self_attn", "model", "key", "weird-name"])
def test_tricky_names(name, tmp_path):
    model = get_peft_model(tiny_model("llama"), another(reparam="mlp"), adapter_name=name)
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / name, adapter_name=name)
    assert torch.equal(logits(loaded), logits(model))
    renamed = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / name, adapter_name="other")
    assert torch.equal(logits(renamed), logits(model))


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_bases(autocast, tmp_path):
    base = tiny_model("llama").to(torch.bfloat16)
    model = get_peft_model(base, another(reparam="mlp"), autocast_adapter_dtype=autocast)
    expected = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for name, p in model.named_parameters() if "prefix_ext" in name} == {expected}
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_model("llama").to(torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast
    )
    assert torch.equal(logits(loaded), logits(model))


def test_a_config_that_replaces_the_saved_one(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = PrefixExtConfig.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="offloading is not supported"):
        loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, config=config, ephemeral_gpu_offload=True)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="must be a PeftConfig"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path, config={"peft_type": "PREFIX_EXT"})


def test_trainable_parameters_are_counted(model, capsys):
    trained, total = model.get_nb_trainable_parameters()
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trained:,} || all params: {total:,} ||")


def test_injection_by_a_state_dict(model):
    base = inject_adapter_in_model(another(), tiny_model("llama"), state_dict=get_peft_model_state_dict(model))
    assert logits(base).isfinite().all()


def test_injection_without_a_peft_model(model):
    base = inject_adapter_in_model(another(), tiny_model("llama"))
    assert base(input_ids=IDS).logits.shape == logits(model).shape
    assert any("prefix_ext_key.default" in name for name in base.state_dict())


def test_gradient_checkpointing_as_peft_prepares_it(llama):
    llama.gradient_checkpointing_enable({"use_reentrant": True})
    model = with_prefix(llama, reparam="mlp").train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
