"""What is saved is what was trained, to the bit, and what goes on training is what was saved."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from helpers.prefixed import perturb, with_prefix
from helpers.tiny import random_ids, tiny_config, tiny_model
from peft_prefix_ext import PrefixCheckpointError, PrefixExtConfig, read_prefix
from peft_prefix_ext.checkpoint.fingerprint import fingerprint
from peft_prefix_ext.checkpoint.format import FLOAT_DTYPES, magnitude

IDS = random_ids(2, 9)


def trained(name="llama", **config):
    model = with_prefix(tiny_model(name), num_frozen_tokens=2, **config)
    perturb(model)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("reparam", ["none", "mlp"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "falcon"])
def test_round_trip_is_bit_exact(name, reparam, tmp_path):
    model = trained(name, reparam=reparam)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any("reparam" in key for key in loaded.state_dict())
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_model(name), tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    resumed = PeftModel.from_pretrained(tiny_model(name), tmp_path, is_trainable=True)
    assert torch.equal(logits(resumed), logits(model))
    ours, theirs = model.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {n for n, p in resumed.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def step(model):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return logits(model)


def test_training_goes_on_as_if_never_saved(tmp_path):
    model = trained(reparam="mlp", reparam_num_layers=2)
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert torch.equal(step(resumed), step(model))


def test_without_the_mlp_training_goes_on_from_the_kv(tmp_path):
    model = trained(reparam="mlp", save_reparam=False)
    model.save_pretrained(tmp_path)
    assert all(
        key.endswith(("prefix_ext_key", "prefix_ext_value"))
        for key in load_file(tmp_path / "adapter_model.safetensors")
    )
    with pytest.warns(UserWarning, match="has no reparameterization"):
        resumed = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert torch.equal(logits(resumed), logits(model))
    assert not torch.equal(step(resumed), logits(model))


def test_auto_class_second_adapter_and_low_memory(tmp_path):
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    model = trained(reparam="mlp")
    model.save_pretrained(tmp_path / "one")
    config = tmp_path / "one" / "adapter_config.json"
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{tmp_path}/base"')
    )
    expected = logits(model)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one")), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "one", low_cpu_mem_usage=True)), expected)
    resumed = PeftModel.from_pretrained(
        tiny_model("llama"), tmp_path / "one", is_trainable=True, low_cpu_mem_usage=True
    )
    # PEFT leaves these weights where the file was mapped, and matrix products may round by how memory is aligned.
    torch.testing.assert_close(logits(resumed), expected, atol=1e-5, rtol=1e-5)
    other = with_prefix(tiny_model("llama"), seed=9, num_virtual_tokens=3)
    other.load_adapter(tmp_path / "one", adapter_name="one")
    other.set_adapter("one")
    assert torch.equal(logits(other), expected)


def test_a_saved_config_alone_is_no_adapter(tmp_path):
    trained().save_pretrained(tmp_path)
    model = get_peft_model(tiny_model("llama"), PrefixExtConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="its weights were never loaded"):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match="its weights were never loaded"):
        model.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    model.load_state_dict(loaded.state_dict())
    assert torch.equal(logits(model), logits(loaded))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 2},
        {"hidden_size": 128},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    ],
)
def test_another_base_is_refused(change, tmp_path):
    trained().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was trained on another base model"):
        PeftModel.from_pretrained(tiny_model("llama", **change), tmp_path)


def test_a_window_of_zero_is_none():
    config = tiny_config("qwen2_moe")
    assert config.sliding_window == 0
    assert fingerprint(config)["sliding_window"] is None


@pytest.mark.parametrize("window", [None, 16])
def test_another_sliding_window_is_refused(window, tmp_path):
    trained("mistral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"sliding_window is 24 in the adapter and {window} in the model"):
        PeftModel.from_pretrained(tiny_model("mistral", sliding_window=window), tmp_path)


def test_reader_gives_what_the_model_uses(tmp_path):
    model = trained(reparam="mlp")
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


def test_a_classifier_keeps_its_head_and_is_no_prefix_alone(tmp_path):
    def classifier():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=3))

    model = get_peft_model(classifier(), PrefixExtConfig(task_type="SEQ_CLS", num_virtual_tokens=4, init_std=1.0))
    perturb(model)
    assert any("score" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(classifier(), tmp_path)), logits(model))
    with pytest.raises(PrefixCheckpointError, match="holds weights of the base model beside the prefix"):
        read_prefix(tmp_path)


@pytest.fixture
def folder(tmp_path):
    trained().save_pretrained(tmp_path)
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
        (lambda f: edit_config(f, format_version=2), "has format version 2, this release reads 1"),
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


def test_no_such_folder(tmp_path):
    with pytest.raises(PrefixCheckpointError, match="there is no such folder"):
        read_prefix(tmp_path / "nowhere")


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1, -100])
def test_a_truncated_file_is_refused(folder, length):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(PrefixCheckpointError, match="cannot be read as safetensors"):
        read_prefix(folder)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES.values(), ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 4099])
def test_no_place_hides_what_is_not_finite(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    assert magnitude(tensor) == tensor.abs().max().item()
    for place in {0, size // 2, size - 1}:
        for value in (math.nan, math.inf, -math.inf):
            spoiled = tensor.clone()
            spoiled[place] = value
            assert not math.isfinite(magnitude(spoiled))
    assert magnitude(tensor[:0]) == 0
