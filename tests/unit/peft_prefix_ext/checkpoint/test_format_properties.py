"""For any bytes the reader returns a prefix or raises one kind of error."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.prefixed import with_prefix
from helpers.tiny import tiny_model
from peft_prefix_ext import PrefixCheckpoint, PrefixCheckpointError, read_prefix

SETTINGS = settings(max_examples=150)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with_prefix(tiny_model("llama")).save_pretrained(folder)
    return folder


def read_or_refuse(folder) -> PrefixCheckpoint | None:
    """Reads, or returns None after the one kind of error; any other is a failure."""
    try:
        return read_prefix(folder)
    except PrefixCheckpointError:
        return None


@SETTINGS
@given(data=st.data())
def test_any_config_value(saved, tmp_path, data):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    config = json.loads((saved / "adapter_config.json").read_text())
    field = data.draw(
        st.sampled_from(["peft_type", "num_virtual_tokens", "format_version", "prefix_layers", "base_fingerprint"])
    )
    config[field] = data.draw(JSON)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    read_or_refuse(folder)


@SETTINGS
@given(data=st.data())
def test_any_damaged_byte(saved, tmp_path, data):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    path = folder / "adapter_model.safetensors"
    content = bytearray((saved / "adapter_model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 1200))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    result = read_or_refuse(folder)
    if result is not None:
        assert {tuple(tensor.shape) for layer in result.layers.values() for tensor in layer} == {(2, 7, 16)}
