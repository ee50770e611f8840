"""The tuner for ms-swift, called as ms-swift does; its own classes are stood in for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from helpers.other_trainers import integration
from helpers.prefixed import perturb
from helpers.tiny import random_ids, tiny_config, tiny_model
from peft_prefix_ext import PrefixExtConfig

OPTIONS = {"num_virtual_tokens": 5, "init_token_ids": [11, 12, 13, 14, 15]}


@pytest.fixture
def swift() -> Iterator[ModuleType]:
    with integration("ms_swift") as module:
        yield module


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=random_ids(2, 9)).logits


@pytest.mark.parametrize("gathered", [False, True])
def test_a_prefix_is_made_saved_and_loaded(gathered: bool, swift: ModuleType, tmp_path: Path) -> None:
    tuner = swift.register(**OPTIONS)
    assert swift.tuners_map == {"prefix_ext": tuner}
    model = tuner.prepare_model(SimpleNamespace(task_type="causal_lm"), tiny_model("llama"))
    config = model.peft_config["default"]
    assert (config.task_type, config.init_token_ids) == ("CAUSAL_LM", OPTIONS["init_token_ids"])
    perturb(model)
    state = {name: each.clone() for name, each in model.state_dict().items()} if gathered else None
    expected = logits(model)
    if gathered:
        perturb(model)  # as if what is trained were in other processes
    tuner.save_pretrained(model, str(tmp_path), state_dict=state, safe_serialization=True)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(tiny_model("llama")), atol=1e-2)


def test_a_classifier(swift: ModuleType) -> None:
    base = AutoModelForSequenceClassification.from_config(tiny_config("llama"))
    model = swift.register().prepare_model(SimpleNamespace(task_type="seq_cls"), base)
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]


def test_another_name_and_no_options(swift: ModuleType) -> None:
    tuner = swift.register("prefix")
    model = tuner.prepare_model(SimpleNamespace(task_type="embedding"), tiny_model("llama"))
    assert list(swift.tuners_map) == ["prefix"]
    assert model.peft_config["default"].task_type is None
    assert model.peft_config["default"].num_virtual_tokens == PrefixExtConfig().num_virtual_tokens


def test_wrong_options_are_refused_at_once(swift: ModuleType) -> None:
    with pytest.raises(ValueError, match="A prefix has no option 'lora_rank'"):
        swift.register(lora_rank=8)
    assert not swift.tuners_map
