"""What does not train is the first process' in all of them, however they were seeded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchrun import torchrun


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same_start")
    torchrun(Path(__file__).with_name("same_start.py"), str(folder))
    return folder


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ("mlp", lambda name, state: state if "prefix_ext_init" in name else None),
        ("mlp-frozen", lambda name, state: state[:, :2] if name.endswith(("ext_key", "ext_value")) else None),
        ("flat-of-some-layers", lambda name, state: state[:, :3] if "layers.1." in name else state),
        ("vocab", lambda name, state: state if "prefix_ext_init" in name else None),
    ],
)
def test_what_does_not_train_is_the_first_process(setting, kept, started):
    def states(when, rank):
        tensors = load_file(started / setting / f"{when}-{rank}" / "adapter_model.safetensors")
        return {name: part for name, state in tensors.items() if (part := kept(name, state)) is not None}

    first, other = states("before", 0), states("before", 1)
    assert first
    assert any(not torch.equal(first[name], other[name]) for name in first)
    for rank in (0, 1):
        for name, state in states("after", rank).items():
            torch.testing.assert_close(state, first[name], atol=0.0, rtol=0.0, msg=name)
