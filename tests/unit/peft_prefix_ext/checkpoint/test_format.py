"""The bytes of an adapter, and the check for values that are not finite."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
import torch

from helpers.prefixed import with_prefix
from helpers.tiny import tiny_model
from peft_prefix_ext.checkpoint.format import FLOAT_DTYPES, magnitude


def test_the_bytes_on_disk(tmp_path):
    """The format is a promise to every server that reads it: a change here needs a new `FORMAT_VERSION`."""
    overrides = {
        "num_hidden_layers": 1,
        "hidden_size": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
    }
    model = with_prefix(tiny_model("llama", **overrides), num_virtual_tokens=2)
    layer = model.get_base_model().model.layers[0].self_attn.prefix_ext
    with torch.no_grad():
        layer.prefix_ext_key["default"].copy_(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        layer.prefix_ext_value["default"].copy_(torch.tensor([[[5.0, 6.0], [7.0, 8.0]]]))
    model.save_pretrained(tmp_path)
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"base_model.model.model.layers.0.self_attn.prefix_ext.prefix_ext_key":'
        b'{"dtype":"F32","shape":[1,2,2],"data_offsets":[0,16]},'
        b'"base_model.model.model.layers.0.self_attn.prefix_ext.prefix_ext_value":'
        b'{"dtype":"F32","shape":[1,2,2],"data_offsets":[16,32]}}'
    )
    header += b" " * (-len(header) % 8)
    data = np.arange(1, 9, dtype="<f4").tobytes()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == struct.pack("<Q", len(header)) + header + data
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    recorded = ("peft_type", "num_virtual_tokens", "format_version", "prefix_layers", "base_fingerprint")
    assert {key: config[key] for key in recorded} == {
        "peft_type": "PREFIX_EXT",
        "num_virtual_tokens": 2,
        "format_version": 1,
        "prefix_layers": [
            {"index": 0, "module": "model.layers.0.self_attn", "key_shape": [1, 2, 2], "value_shape": [1, 2, 2]}
        ],
        "base_fingerprint": {
            "model_type": "llama",
            "hidden_size": 4,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 2,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    }


@pytest.mark.parametrize("dtype", FLOAT_DTYPES.values(), ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 4099])
def test_a_value_that_is_not_finite_is_found_at_any_place(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    assert magnitude(tensor) == tensor.abs().max().item()
    for place in {0, size // 2, size - 1}:
        for value in (math.nan, math.inf, -math.inf):
            spoiled = tensor.clone()
            spoiled[place] = value
            assert not math.isfinite(magnitude(spoiled))
    assert magnitude(tensor[:0]) == 0
