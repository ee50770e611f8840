"""Format version 2: the states that recurrent layers start from."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_prefix_ext.checkpoint import LayerKV, LayerState, PrefixCheckpointError, read_prefix, write_prefix
from peft_prefix_ext.checkpoint.compatibility import StateShape, compare_states
from peft_prefix_ext.checkpoint.format import is_of_prefix
from peft_prefix_ext.checkpoint.summary import as_dict, as_text

KV = LayerKV(torch.arange(4.0).view(1, 2, 2), torch.arange(4.0, 8.0).view(1, 2, 2))
STATE = LayerState(conv=(torch.arange(6.0).view(2, 3),), recurrent=(torch.arange(8.0).view(1, 2, 4),))
ROWS = [
    {"index": 0, "module": "model.layers.0.mixer", "kind": "conv", "number": 0, "shape": [2, 3], "dtype": "float32"},
    {
        "index": 0,
        "module": "model.layers.0.mixer",
        "kind": "recurrent",
        "number": 0,
        "shape": [1, 2, 4],
        "dtype": "float32",
    },
]


def write(folder, layers=None, states=None, modules=None, **config):
    return write_prefix(
        folder,
        {1: KV} if layers is None else layers,
        {1: "model.layers.1.self_attn"},
        states={0: STATE} if states is None else states,
        state_modules=modules or {0: "model.layers.0.mixer"},
        **config,
    )


def edit_rows(folder, rows):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prefix_states": rows}))


def test_the_bytes_on_disk(tmp_path):
    """The format is a promise to every server that reads it: a change here needs a new version."""
    write(tmp_path)
    names = ["0.mixer.prefix_ext.prefix_ext_conv_state_0", "0.mixer.prefix_ext.prefix_ext_recurrent_state_0"]
    names += ["1.self_attn.prefix_ext.prefix_ext_key", "1.self_attn.prefix_ext.prefix_ext_value"]
    shapes, start, entries = ["[2,3]", "[1,2,4]", "[1,2,2]", "[1,2,2]"], 0, []
    for name, shape, size in zip(names, shapes, (24, 32, 16, 16), strict=True):
        place = f'"dtype":"F32","shape":{shape},"data_offsets":[{start},{start + size}]'
        entries.append(f'"base_model.model.model.layers.{name}":{{{place}}}')
        start += size
    header = ('{"__metadata__":{"format":"pt"},' + ",".join(entries) + "}").encode()
    header += b" " * (-len(header) % 8)
    data = np.concatenate([np.arange(6), np.arange(8), np.arange(8)]).astype("<f4").tobytes()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == struct.pack("<Q", len(header)) + header + data
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["format_version"] == 2
    assert config["prefix_states"] == ROWS


def test_states_are_read_back(tmp_path):
    several = LayerState(conv=(torch.ones(2, 3), torch.zeros(4, 3)), recurrent=(torch.full((1, 2, 2), 3.0),))
    states = {0: STATE, 1: several, 12: LayerState(conv=(torch.ones(5, 2, dtype=torch.bfloat16),))}
    modules = {index: f"model.layers.{index}.mixer" for index in states}
    found = write(tmp_path, states=states, modules=modules)
    assert list(found.layers) == [1]
    assert list(found.states) == [0, 1, 12]
    assert found.state_modules == modules
    for index, state in states.items():
        pairs = zip(found.states[index].numbered(), state.numbered(), strict=True)
        assert all(a[:2] == b[:2] and a[2].dtype == b[2].dtype and torch.equal(a[2], b[2]) for a, b in pairs)
    assert found.num_bytes == 32 + 24 + 32 + 24 + 48 + 16 + 20
    assert found.state_shapes[:2] == (StateShape(0, "conv", 0, (2, 3)), StateShape(0, "recurrent", 0, (1, 2, 4)))


def test_a_prefix_of_states_alone(tmp_path):
    found = write(tmp_path, layers={}, num_virtual_tokens=5)
    assert (found.num_virtual_tokens, found.layers, list(found.states)) == (5, {}, [0])
    assert "norms" not in as_text(found)


def test_without_states_nothing_of_version_2_is_written(tmp_path):
    write(tmp_path / "with")
    config = json.loads((tmp_path / "with" / "adapter_config.json").read_text())
    found = write(tmp_path / "without", states={}, **config)
    assert found.states == {}
    assert found.config["format_version"] == 1
    assert "prefix_states" not in found.config


def test_the_summary_lists_states(tmp_path):
    found = write(tmp_path)
    assert "states      0: conv state [2, 3], float32" in as_text(found)
    facts = as_dict(found)["states"]
    assert [row["kind"] for row in facts] == ["conv", "recurrent"]
    assert facts[0]["norm"] == pytest.approx(float(STATE.conv[0].norm()), abs=1e-3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "must list the states of format version 2"),
        ("both", "must list the states of format version 2|malformed row"),
        (ROWS[:1] * 2, "malformed row"),
        ([{**ROWS[0], "number": 1}], "malformed row"),
        ([{**ROWS[0], "kind": "key"}], "malformed row"),
        ([{**ROWS[0], "index": -1}], "malformed row"),
        ([{**ROWS[0], "index": True}], "malformed row"),
        ([ROWS[0], {**ROWS[1], "module": "other"}], "malformed row"),
        ([{name: ROWS[0][name] for name in ("index", "module")}], "malformed row"),
        (["conv"], "malformed row"),
        ([{**ROWS[0], "shape": [3, 2]}], r"expected floats of shape \[3, 2\]"),
        ([{**ROWS[0], "module": "other"}], "has no tensor"),
    ],
)
def test_damage_is_named(tmp_path, rows, message):
    write(tmp_path)
    edit_rows(tmp_path, rows)
    with pytest.raises(PrefixCheckpointError, match=message):
        read_prefix(tmp_path)


def test_states_that_are_not_finite_are_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if "recurrent" in name)[0, 1, 2] = float("inf")
    save_file(tensors, path)
    with pytest.raises(PrefixCheckpointError, match=r"The recurrent state of layer 0 in .* holds NaN or Inf"):
        read_prefix(tmp_path)


@pytest.mark.parametrize("kind", ["conv", "recurrent"])
def test_states_belong_to_the_prefix(kind):
    assert is_of_prefix(f"base_model.model.model.layers.0.mixer.prefix_ext.prefix_ext_{kind}_state_0")
    assert not is_of_prefix(f"base_model.model.model.layers.0.mixer.{kind}_state_0")


def test_states_of_another_model(tmp_path):
    found = write(tmp_path)
    mine = found.state_shapes
    found.check_base({}, states=mine)
    with pytest.raises(PrefixCheckpointError, match=r"layer 0 has a conv state \[2, 3\], the model has \[2, 4\]"):
        found.check_base({}, states=[StateShape(0, "conv", 0, (2, 4)), mine[1]])
    assert compare_states((), mine) == []
    assert compare_states(mine, ()) == [
        "layer 0 has no conv state in the model",
        "layer 0 has no recurrent state in the model",
    ]
    assert compare_states(mine[:1], mine) == ["layer 0 has no recurrent state in the adapter"]
    assert compare_states(mine, mine[1:], whole_model=False) == []
