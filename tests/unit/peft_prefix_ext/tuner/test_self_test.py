"""A prefix is refused if it would not act like its text, or if the model cannot have one."""

from __future__ import annotations

import pytest
import torch
import transformers

from helpers.prefixed import with_prefix
from helpers.tiny import REFUSED, tiny_model
from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.base_model.states import map_states
from peft_prefix_ext.injection.batch import BatchAdapters
from peft_prefix_ext.injection.layer import PrefixExtLayer
from peft_prefix_ext.tuner import self_test


def zeros_like(states):
    return map_states(states, torch.zeros_like)


@pytest.mark.parametrize("name", list(REFUSED))
def test_models_that_cannot_have_a_prefix(name):
    model = tiny_model(name, attention="eager")
    with pytest.raises(ValueError, match=REFUSED[name]["why"]) as refusal:
        with_prefix(model)
    assert describe(model) in str(refusal.value)
    assert not any("prefix_ext" in key for key, _ in model.named_modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_errors_name_the_model_and_the_transformers_release(llama):
    release = f"transformers {transformers.__version__}"
    assert describe(llama) == f"LlamaForCausalLM (model type 'llama', {release})"
    assert describe(llama.lm_head) == f"Linear ({release})"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("llama", lambda patch: patch.setattr(BatchAdapters, "shift", 0)),  # positions that overlap those of the prefix
        ("llama", lambda patch: patch.setattr(BatchAdapters, "shift", 5)),
        ("llama", lambda patch: patch.setattr(PrefixExtLayer, "_mask", lambda layer, step, mask, k: None)),
        ("bloom", lambda patch: patch.setattr(self_test, "select_layer_class", lambda *args: PrefixExtLayer)),
        ("gemma4", lambda patch: patch.setattr(self_test, "find_shared_kv_layers", lambda *args: [])),
        ("bamba", lambda patch: patch.setattr(self_test, "_return_states", lambda states, *args: zeros_like(states))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prefix_that_would_be_wrong_is_refused(name, wrong, dtype, monkeypatch):
    wrong(monkeypatch)
    with pytest.raises(ValueError, match=r"gives other logits after a prefix|does not run with a prefix"):
        with_prefix(tiny_model(name, attention="eager").to(dtype))


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "gemma4", "qwen3_moe", "deepseek_v3", "qwen3_next", "bloom", "llama4"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_accepted(name, dtype):
    with_prefix(tiny_model(name, attention="eager").to(dtype))
