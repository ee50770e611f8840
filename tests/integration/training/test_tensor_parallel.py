"""A prefix of a tensor-parallel model is the prefix of the whole model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers.scripts import torchrun
from peft_prefix_ext import read_prefix

SETTINGS = ["llama/flat", "llama/mlp", "llama/vocab", "qwen3/mlp", "deepseek_v3/flat"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    torchrun("tensor_parallel", folder)
    return folder


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_processes_learn_what_one_learns(setting, trained):
    losses = {
        who: torch.tensor(given) for who, given in json.loads((trained / setting / "losses.json").read_text()).items()
    }
    assert losses.keys() == {"together", "resumed", "alone"}
    for who in losses:
        torch.testing.assert_close(losses[who], losses["alone"], atol=1e-5, rtol=0.0, msg=who)
    assert losses["alone"].unique().numel() > 1


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_process_saves_all_heads(setting, trained):
    for name in ("start", "together"):
        some, others = (
            load_file(trained / setting / f"{name}-{rank}" / "adapter_model.safetensors") for rank in (0, 1)
        )
        assert some.keys() == others.keys()
        assert all(torch.equal(some[key], others[key]) for key in some)
    together, alone = (read_prefix(trained / setting / who) for who in ("together-0", "alone"))
    assert together.layers.keys() == alone.layers.keys()
    for index, layer in together.layers.items():
        torch.testing.assert_close(layer, alone.layers[index], atol=1e-4, rtol=1e-3)
