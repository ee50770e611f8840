"""The reader returns what the model uses, and names what is wrong with an adapter."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from helpers.prefixed import trained_model
from helpers.tiny import tiny_model
from peft_prefix_ext import PrefixCheckpointError, read_prefix
from peft_prefix_ext.checkpoint import reader, safetensors_file
from peft_prefix_ext.checkpoint.fingerprint import fingerprint
from peft_prefix_ext.checkpoint.reader import read_header


def test_reader_gives_what_the_model_uses(tmp_path):
    model = trained_model(reparam="mlp")
    model.save_pretrained(tmp_path)
    prefix = read_prefix(tmp_path)
    assert prefix.num_virtual_tokens == 7
    assert prefix.peft_type == "PREFIX_EXT"
    assert sorted(prefix.layers) == [0, 1, 2]
    assert prefix.num_bytes == 3 * 2 * 2 * 7 * 16 * 4
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).get_base_model()
    for index, kv in prefix.layers.items():
        layer = loaded.model.layers[index].self_attn.prefix_ext
        assert torch.equal(layer.prefix_ext_key["default"], kv.key)
        assert torch.equal(layer.prefix_ext_value["default"], kv.value)
    prefix.check_base(fingerprint(tiny_model("llama").config))
    with pytest.raises(PrefixCheckpointError, match="model_type is 'llama' in the adapter and 'qwen3' in the model"):
        prefix.check_base(fingerprint(tiny_model("qwen3").config))


@pytest.mark.parametrize("stock", [PrefixTuningConfig, CartridgeConfig])
def test_reader_reads_stock_adapters(stock, tmp_path):
    model = get_peft_model(tiny_model("llama"), stock(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    model.save_pretrained(tmp_path)
    prefix = read_prefix(tmp_path)
    assert prefix.num_virtual_tokens == 5
    cache = model.get_prompt(batch_size=1)
    for index, kv in prefix.layers.items():
        assert torch.equal(cache.layers[index].keys[0], kv.key)
        assert torch.equal(cache.layers[index].values[0], kv.value)


@pytest.fixture
def folder(tmp_path):
    trained_model().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_rows(folder, **changes):
    rows = json.loads((folder / "adapter_config.json").read_text())["prefix_layers"]
    edit_config(folder, prefix_layers=[{**row, **changes} for row in rows])


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, sorted(tensors)[0])
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "No adapter_config.json in"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "is of type None, not a prefix"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "No adapter_model.safetensors in"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "is a pickle and is never read"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 64), "cannot be read as safetensors"),
        (lambda f: edit_config(f, peft_type="LORA"), "is of type 'LORA', not a prefix"),
        (lambda f: edit_config(f, format_version=3), "has format version 3, this release reads 1 and 2"),
        (lambda f: edit_config(f, format_version=2), "`prefix_states` in .* must list the states"),
        (lambda f: edit_config(f, num_virtual_tokens=0), "must be >= 1, got 0"),
        (lambda f: edit_config(f, num_virtual_tokens="7"), "must be >= 1, got '7'"),
        (lambda f: edit_config(f, num_virtual_tokens=8), "do not fit together"),
        (lambda f: edit_config(f, prefix_layers=[]), "`prefix_layers` is missing"),
        (lambda f: edit_config(f, prefix_layers=[{"index": 0}]), "malformed row"),
        (lambda f: edit_rows(f, key_shape=[224]), "malformed row"),
        (lambda f: edit_rows(f, index=True), "malformed row"),
        (lambda f: edit_rows(f, attention="both"), "malformed row"),
        (lambda f: edit_weights(f, lambda t, k: t.pop(k)), "has no tensor"),
        (lambda f: edit_weights(f, lambda t, k: t.update({k: t[k][:, :3].clone()})), "expected floats of shape"),
        (lambda f: edit_weights(f, lambda t, k: t.update({k: t[k].int()})), "expected floats of shape"),
        (lambda f: edit_weights(f, lambda t, k: t[k].view(-1)[3].fill_(float("nan"))), "holds NaN or Inf"),
    ],
)
def test_damage_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(PrefixCheckpointError, match=message):
        read_prefix(folder)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_no_file_is_not_waited_for(folder, name, kind):
    (folder / name).unlink()
    {
        "fifo": lambda: os.mkfifo(folder / name),
        "device": lambda: (folder / name).symlink_to("/dev/zero"),
        "folder": lambda: (folder / name).mkdir(),
    }[kind]()
    for read in (read_prefix, read_header):
        with pytest.raises(PrefixCheckpointError, match=r"cannot be read as JSON|No adapter_model|No adapter_config"):
            read(folder)


def test_the_header_says_all_but_the_values(folder):
    whole, header = read_prefix(folder), read_header(folder)
    assert (header.layer_shapes, header.state_shapes, header.config) == (
        whole.layer_shapes,
        whole.state_shapes,
        whole.config,
    )
    assert (header.digest, header.largest) == ("", None)
    assert whole.largest == max(float(tensor.abs().max()) for _, _, tensor in whole.tensors())
    edit_weights(folder, lambda t, k: t[k].view(-1)[3].fill_(float("nan")))
    assert read_header(folder).layer_shapes == whole.layer_shapes
    # Whatever else of its kind was read before.
    edit_config(folder, num_virtual_tokens=8)
    with pytest.raises(PrefixCheckpointError, match="do not fit together"):
        read_header(folder)


def test_only_what_the_config_describes_takes_memory(folder, monkeypatch):
    lengths = []
    original = safetensors_file.read_into
    monkeypatch.setattr(
        safetensors_file, "read_into", lambda file, content: lengths.append(len(content)) or original(file, content)
    )
    size = 8 << 20
    edit_weights(folder, lambda t, k: t.update({k.replace(".0.", ".9."): torch.zeros(size // 4)}))
    whole = read_prefix(folder)
    assert max(lengths) < size
    assert whole.digest == hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    # A shape that does not fit is refused before the values.
    edit_weights(folder, lambda t, k: t.update({k: torch.zeros(size // 4)}))
    lengths.clear()
    with pytest.raises(PrefixCheckpointError, match="expected floats of shape"):
        read_prefix(folder)
    assert len(lengths) == 2


def test_very_large_headers_are_not_kept(folder, monkeypatch):
    reader._known_tables.clear()
    read_header(folder)
    assert len(reader._known_tables) == 1
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"more": "x" * safetensors_file.MAX_KEPT_BYTES})
    reader._known_tables.clear()
    read_header(folder)
    assert not reader._known_tables
    # Nor parsed for each tensor.
    parsed = []
    original = safetensors_file._parse
    monkeypatch.setattr(safetensors_file, "_parse", lambda text: parsed.append(1) or original(text))
    read_prefix(folder)
    assert len(parsed) == 1


def test_no_such_folder(tmp_path):
    with pytest.raises(PrefixCheckpointError, match="there is no such folder"):
        read_prefix(tmp_path / "nowhere")


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1, -100])
def test_a_truncated_file_is_refused(folder, length):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(PrefixCheckpointError, match="cannot be read as safetensors"):
        read_prefix(folder)
