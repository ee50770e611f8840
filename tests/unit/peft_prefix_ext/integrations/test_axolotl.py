"""The plugin for Axolotl, called as Axolotl does; its own classes are stood in for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from helpers.other_trainers import integration
from helpers.prefixed import perturb, prefix_kv
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig

OPTIONS = {"num_virtual_tokens": 5, "init_token_ids": [11, 12, 13, 14, 15]}


class Config(dict):
    """A configuration of Axolotl: what is not in it is None."""

    def __getattr__(self, name: str) -> Any:
        value = self.get(name)
        return Config(value) if isinstance(value, dict) else value

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


@pytest.fixture
def axolotl() -> Iterator[ModuleType]:
    with integration("axolotl") as module:
        yield module


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=random_ids(2, 9)).logits


def test_the_adapter_is_made_as_configured(axolotl: ModuleType) -> None:
    plugin = axolotl.PrefixExtPlugin()
    config = Config(adapter="prefix_ext", prefix_ext=OPTIONS)
    model, none = plugin.load_adapter(tiny_model("llama"), config)
    wanted = get_peft_model(tiny_model("llama"), PrefixExtConfig(task_type="CAUSAL_LM", **OPTIONS))
    assert torch.equal(logits(model), logits(wanted))
    assert not torch.allclose(logits(model), logits(tiny_model("llama")), atol=1e-2)
    assert {name for name, each in model.named_parameters() if each.requires_grad} == {
        name for name, each in wanted.named_parameters() if each.requires_grad
    }
    assert none is None  # Axolotl would save it at once


def test_its_name_is_registered(axolotl: ModuleType) -> None:
    plugin = axolotl.PrefixExtPlugin()
    assert [each.name for each in plugin.get_adapter_capabilities()] == ["prefix_ext"]
    module, _, name = plugin.get_input_args().rpartition(".")
    assert (module, getattr(axolotl, name)) == (axolotl.__name__, axolotl.PrefixExtArgs)


@pytest.mark.parametrize("options", [None, OPTIONS])
def test_trainers_that_add_it_themselves_get_the_config(options: dict | None, axolotl: ModuleType) -> None:
    model = tiny_model("llama")
    config = Config(adapter="prefix_ext", prefix_ext=options)
    none, peft_config = axolotl.PrefixExtPlugin().load_adapter(model, config, inference=False, config_only=True)
    assert none is None
    assert peft_config == PrefixExtConfig(task_type="CAUSAL_LM", **(options or {}))
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("inference", [False, True])
def test_a_saved_prefix_is_loaded(inference: bool, axolotl: ModuleType, tmp_path: Path) -> None:
    saved = get_peft_model(tiny_model("llama"), PrefixExtConfig(task_type="CAUSAL_LM", **OPTIONS))
    perturb(saved)
    saved.save_pretrained(str(tmp_path))
    config = Config(adapter="prefix_ext", lora_model_dir=str(tmp_path))
    model, _ = axolotl.PrefixExtPlugin().load_adapter(tiny_model("llama"), config, inference=inference)
    assert isinstance(model, PeftModel)
    assert torch.equal(logits(model), logits(saved))
    assert any(each.requires_grad for each in model.parameters()) is not inference


def test_the_dtype_of_the_prefix(axolotl: ModuleType) -> None:
    for autocast, dtype in ((None, torch.float32), (False, torch.bfloat16)):
        config = Config(adapter="prefix_ext", prefix_ext={"reparam": "none"}, peft_autocast_adapter_dtype=autocast)
        model, _ = axolotl.PrefixExtPlugin().load_adapter(tiny_model("llama").bfloat16(), config)
        assert {each.dtype for each in model.parameters() if each.requires_grad} == {dtype}


def test_other_adapters_are_left_alone(axolotl: ModuleType) -> None:
    model = tiny_model("llama")
    assert axolotl.PrefixExtPlugin().load_adapter(model, Config(adapter="lora")) is None
    assert not hasattr(model, "peft_config")
    assert axolotl.PrefixExtArgs(adapter="lora", load_in_4bit=True).prefix_ext is None


def test_options_are_kept(axolotl: ModuleType) -> None:
    assert axolotl.PrefixExtArgs(adapter="prefix_ext", prefix_ext=OPTIONS).prefix_ext == OPTIONS


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"adapter": "prefix_ext", "prefix_ext": {"lora_r": 8}}, "A prefix has no option 'lora_r'"),
        ({"adapter": "prefix_ext", "prefix_ext": {"reparam": "lora"}}, "`reparam` must be one of"),
        ({"adapter": "lora", "prefix_ext": OPTIONS}, "so set `adapter: prefix_ext`"),
        ({"adapter": "prefix_ext", "load_in_4bit": True}, "does not quantize the base model"),
        ({"adapter": "prefix_ext", "load_in_8bit": True}, "does not quantize the base model"),
    ],
)
def test_what_is_refused_before_the_model_is_loaded(configuration: dict, message: str, axolotl: ModuleType) -> None:
    with pytest.raises(ValueError, match=message):
        axolotl.PrefixExtArgs(**configuration)


def test_a_changed_prefix_is_another(axolotl: ModuleType) -> None:
    config = Config(adapter="prefix_ext", prefix_ext={**OPTIONS, "init_token_ids": [21, 22, 23, 24, 25]})
    model, _ = axolotl.PrefixExtPlugin().load_adapter(tiny_model("llama"), config)
    wanted = get_peft_model(tiny_model("llama"), PrefixExtConfig(task_type="CAUSAL_LM", **OPTIONS))
    ours, other = prefix_kv(model), prefix_kv(wanted)
    assert not any(torch.allclose(ours[name], other[name], atol=1e-3) for name in ours)
