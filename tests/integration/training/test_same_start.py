"""Tensors that do not train are the same in all processes, whatever their seeds."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from helpers.scripts import torchrun


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same_start")
    torchrun("same_start", folder)
    return folder


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("setting", ["mlp", "mlp-frozen", "flat-of-some-layers", "vocab"])
def test_constant_tensors_are_those_of_the_first_process(setting, strategy, started):
    def states(when, rank):
        found = load_file(started / strategy / setting / f"{when}-{rank}.safetensors")
        return {name.partition("model.layers")[2]: state for name, state in found.items()}

    first, other = states("before", 0), states("before", 1)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    for rank in (0, 1):
        after = states("after", rank)
        assert after.keys() == first.keys()
        for name, state in after.items():
            torch.testing.assert_close(state, first[name], atol=0.0, rtol=0.0, msg=name)
