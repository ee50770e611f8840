"""The folder for PEFT-Factory, loaded by the rules that PEFT-Factory loads methods by."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType, register_peft_method
from transformers import HfArgumentParser, TrainingArguments

from helpers.prefixed import perturb
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig, PrefixExtModel
from peft_prefix_ext.integrations import peft_factory

(FOLDER,) = map(Path, peft_factory.__path__)
METHOD = "prefixext"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Loads a file of the method by its path, under a name that is not its own."""
    spec = spec_from_file_location(f"{METHOD}_{name}", FOLDER / METHOD / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def first(module: ModuleType, kind: type) -> Any:
    """Returns the first class of a kind in a module, by the alphabet, other than the kind itself."""
    found = (getattr(module, name) for name in dir(module))
    return next(each for each in found if isinstance(each, type) and issubclass(each, kind) and each is not kind)


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """The config class of the method, which is registered with PEFT by the name of its folder."""
    config = first(load("config", monkeypatch), PeftConfig)
    tuner = first(load("model", monkeypatch), BaseTuner)
    assert issubclass(config, PrefixExtConfig)
    assert issubclass(tuner, PrefixExtModel)
    member = str.__new__(PeftType, METHOD.upper())
    member._name_ = member._value_ = METHOD.upper()
    with monkeypatch.context() as patch:
        for names in (PeftType._member_map_, PeftType._value2member_map_):
            patch.setitem(names, METHOD.upper(), member)
        patch.setattr(PeftType, "_member_names_", [*PeftType._member_names_, METHOD.upper()])
        type.__setattr__(PeftType, METHOD.upper(), member)
        register_peft_method(name=METHOD, config_cls=config, model_cls=tuner, is_mixed_compatible=False)
        yield config
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
            mapping.pop(member)
    type.__delattr__(PeftType, METHOD.upper())


def test_every_folder_is_a_method() -> None:
    folders = [each.name for each in FOLDER.iterdir() if each.is_dir() and each.name != "__pycache__"]
    assert folders == [METHOD]
    assert {"config.py", "model.py"} <= {each.name for each in (FOLDER / METHOD).iterdir()}


def test_options_are_read_and_a_prefix_is_trained_and_saved(arguments: type, tmp_path: Path) -> None:
    options = {
        "output_dir": str(tmp_path),
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 5,
        "init_token_ids": [11, 12, 13, 14, 15],
        "layers_to_train": [0, 2],
        "save_reparam": False,
    }
    _, config = HfArgumentParser([TrainingArguments, arguments]).parse_dict(options)
    model = get_peft_model(tiny_model("llama"), config)
    assert isinstance(model.base_model, PrefixExtModel)
    perturb(model)
    model.save_pretrained(str(tmp_path))
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is PrefixExtConfig
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    ids = random_ids(2, 9)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(tiny_model("llama")(input_ids=ids).logits, expected, atol=1e-2)


def test_options_are_read_from_a_command(arguments: type) -> None:
    words = ["--num_virtual_tokens", "8", "--init_adapter", "a", "b", "--reparam_residual", "false"]
    (config,) = HfArgumentParser([arguments]).parse_args_into_dataclasses(words)
    assert (config.num_virtual_tokens, config.init, config.init_adapter) == (8, "average", ["a", "b"])
    assert config.reparam_residual is False
