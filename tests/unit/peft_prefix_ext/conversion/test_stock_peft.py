"""To stock PEFT and back: same K/V, same logits, and exports load with PEFT alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model

from helpers.prefixed import perturb, with_prefix
from helpers.scripts import TESTS
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixCheckpointError, export_to_peft, import_from_peft, read_prefix, write_prefix
from peft_prefix_ext.checkpoint.format import LayerKV

IDS = random_ids(2, 9)
EAGER = ("gptj", "gpt_oss")
STOCK = ("llama", "qwen3", "gemma3", "mistral", "gpt2", "opt", "gptj", "falcon", "phi", "gpt_oss")

# Runs on its own: this package is never imported.
LOAD_ALONE = """
import json, sys, warnings
from pathlib import Path
import torch
from peft import PeftModel
from helpers.tiny import random_ids
from transformers import AutoModelForCausalLM

for folder in sorted(Path(sys.argv[1]).iterdir()):
    options = json.loads((folder / "options.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(folder / "base", **options).eval()
    model = PeftModel.from_pretrained(base, folder / "stock").eval()
    with torch.no_grad():
        torch.save(model(input_ids=random_ids(2, 9)).logits, folder / "logits.pt")
assert "peft_prefix_ext" not in sys.modules
"""


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def same_kv(one, other):
    return one.layers.keys() == other.layers.keys() and all(
        torch.equal(a, b) for index in one.layers for a, b in zip(one.layers[index], other.layers[index], strict=True)
    )


def base_of(name):
    return tiny_model(name, attention="eager" if name in EAGER else "sdpa")


def test_stock_peft_alone_loads_every_export(tmp_path):
    expected = {}
    for name in STOCK:
        folder = tmp_path / name
        model = with_prefix(base_of(name))
        expected[name] = logits(model)
        model.save_pretrained(folder / "ours")
        export_to_peft(folder / "ours", folder / "stock", "CARTRIDGE" if name == "qwen3" else "PREFIX_TUNING")
        base_of(name).save_pretrained(folder / "base")
        attention = "eager" if name in EAGER else "sdpa"
        (folder / "options.json").write_text(json.dumps({"attn_implementation": attention}))
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, str(tmp_path)],
        cwd=TESTS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in STOCK:
        assert torch.equal(torch.load(tmp_path / name / "logits.pt"), expected[name]), name


@pytest.mark.parametrize("stock", [PrefixTuningConfig, CartridgeConfig])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon"])
def test_stock_adapters_are_imported(name, stock, tmp_path):
    settings = {} if stock is PrefixTuningConfig else {"num_frozen_tokens": 2}
    theirs = get_peft_model(tiny_model(name), stock(task_type="CAUSAL_LM", num_virtual_tokens=5, **settings))
    perturb(theirs)
    theirs.save_pretrained(tmp_path / "stock")
    ours = import_from_peft(tmp_path / "stock", tmp_path / "ours", tiny_model(name))
    assert same_kv(ours, read_prefix(tmp_path / "stock"))
    model = PeftModel.from_pretrained(tiny_model(name), tmp_path / "ours", is_trainable=True)
    assert torch.equal(logits(model), logits(theirs))
    trained = model.get_base_model().get_submodule(ours.modules[0]).prefix_ext.prefix_ext_key["default"]
    assert trained.requires_grad
    assert trained.shape[1] == 5 - settings.get("num_frozen_tokens", 0)
    with pytest.raises(ValueError, match="is PREFIX_EXT already"):
        import_from_peft(tmp_path / "ours", tmp_path / "again", tiny_model(name))


def test_imported_adapters_support_what_stock_refuses(tmp_path):
    """Left-padded generation with sliding windows, which stock PEFT gets silently wrong."""
    base = tiny_model("mistral")
    theirs = get_peft_model(tiny_model("mistral"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    import_from_peft(theirs, tmp_path, base)
    ours = PeftModel.from_pretrained(base, tmp_path)
    ids, mask = random_ids(1, 30), torch.ones(1, 40, dtype=torch.long)
    mask[:, :10] = 0
    padded = torch.cat([torch.zeros(1, 10, dtype=torch.long), ids], dim=1)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[:, -1].argmax(-1)
        alone = ours.generate(input_ids=ids, **greedy)[:, 30:]
        assert torch.equal(alone[:, 0], expected)
        assert torch.equal(ours.generate(input_ids=padded, attention_mask=mask, **greedy)[:, 40:], alone)


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "CARTRIDGE"])
def test_export_keeps_what_an_adapter_is(peft_type, tmp_path):
    model = with_prefix(tiny_model("llama"), num_frozen_tokens=2, reparam="mlp")
    perturb(model)
    model.peft_config["default"].base_model_name_or_path = "owner/name"
    model.peft_config["default"].revision = "abc"
    exported = export_to_peft(model, tmp_path, peft_type)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "abc")
    assert (config["peft_type"], config["task_type"]) == (peft_type, "CAUSAL_LM")
    assert config.get("num_frozen_tokens") == (2 if peft_type == "CARTRIDGE" else None)
    assert exported.digest == read_prefix(tmp_path).digest
    stock = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(stock), logits(model))
    if peft_type == "CARTRIDGE":
        assert stock.prompt_encoder["default"].num_frozen_tokens == 2


def test_a_named_adapter_of_a_live_model(tmp_path):
    model = with_prefix(tiny_model("llama"))
    model.add_adapter("other", model.peft_config["default"])
    perturb(model)
    for name in ("default", "other"):
        model.set_adapter(name)
        exported = export_to_peft(model, tmp_path / name, adapter_name=name)
        assert same_kv(export_to_peft(model, tmp_path / "active"), exported)
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path / name)), logits(model))
    assert not same_kv(read_prefix(tmp_path / "default"), read_prefix(tmp_path / "other"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_survive_both_ways(dtype, tmp_path):
    with_prefix(tiny_model("llama")).save_pretrained(tmp_path / "full")
    full = read_prefix(tmp_path / "full")
    halved = {index: LayerKV(*(state.to(dtype) for state in kv)) for index, kv in full.layers.items()}
    kept = {"task_type": "CAUSAL_LM", "base_fingerprint": full.base_fingerprint}
    ours = write_prefix(tmp_path / "ours", halved, full.modules, **kept)
    stock = export_to_peft(tmp_path / "ours", tmp_path / "stock")
    again = import_from_peft(stock, tmp_path / "again", tiny_model("llama"))
    assert same_kv(stock, ours)
    assert again.digest == ours.digest
    assert {state.dtype for kv in again.layers.values() for state in kv} == {dtype}


def test_export_needs_a_task_type(tmp_path):
    model = with_prefix(tiny_model("llama"), task_type=None)
    with pytest.raises(ValueError, match="`task_type` must be given"):
        export_to_peft(model, tmp_path)
    export_to_peft(model, tmp_path, task_type="CAUSAL_LM")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), logits(model))


def shaped(folder, shapes, **config):
    """Writes an adapter with these `(num_kv_heads, key_dim, value_dim)` by layer index."""
    layers = {
        index: LayerKV(torch.ones(heads, 3, key_dim), torch.ones(heads, 3, value_dim))
        for index, (heads, key_dim, value_dim) in shapes.items()
    }
    modules = {index: f"model.layers.{index}.self_attn" for index in shapes}
    return write_prefix(folder, layers, modules, task_type="CAUSAL_LM", **config)


@pytest.mark.parametrize(
    ("shapes", "config", "message"),
    [
        ({0: (2, 8, 8), 1: (1, 8, 8)}, {}, "its layers differ"),
        ({0: (2, 8, 8), 1: (2, 16, 16)}, {}, "its layers differ"),
        ({0: (2, 12, 8), 1: (2, 12, 8)}, {}, "its keys have 12 entries a head and its values 8"),
        ({0: (2, 8, 8), 2: (2, 8, 8)}, {}, r"hybrid models: this one has a prefix for layers \[0, 2\]"),
        ({0: (2, 8, 8)}, {"base_fingerprint": {"layer_types": ["hybrid"]}}, "does not work on hybrid models"),
        ({0: (1, 8, 8)}, {"base_fingerprint": {"num_key_value_heads": 4}}, "expects 4 KV heads of size 8"),
        (
            {0: (4, 8, 8)},
            {"base_fingerprint": {"num_key_value_heads": 4, "head_dim": 2}},
            "expects 4 KV heads of size 2",
        ),
    ],
)
def test_what_stock_peft_cannot_represent_is_refused(shapes, config, message, tmp_path):
    prefix = shaped(tmp_path / "ours", shapes, **config)
    with pytest.raises(ValueError, match=message):
        export_to_peft(prefix, tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_other_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`peft_type` must be one of \('PREFIX_TUNING', 'CARTRIDGE'\), got 'LORA'"):
        export_to_peft(tmp_path, tmp_path, "LORA")
    with pytest.raises(PrefixCheckpointError, match="neither a folder nor a Hub repository"):
        export_to_peft("/nowhere/at/all", tmp_path)
    with pytest.raises(PrefixCheckpointError, match=r"No adapter_config\.json"):
        export_to_peft(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"num_hidden_layers": 2}, "layer 2 has keys and values"),
        (
            "llama",
            {"num_key_value_heads": 4},
            r"layer 0 has keys and values \(\[2, 5, 16\], \[2, 5, 16\]\) in the adapter",
        ),
    ],
)
def test_a_stock_adapter_of_another_base_is_refused(name, change, message, tmp_path):
    theirs = get_peft_model(tiny_model(name), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    theirs.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=f"was trained on another base model.*{message}"):
        import_from_peft(tmp_path / "stock", tmp_path / "ours", tiny_model(name, **change))


def test_written_is_what_peft_writes(tmp_path):
    """One format, two writers: the bytes are the same, and so is the name that a server gives the content."""
    with_prefix(tiny_model("llama"), num_frozen_tokens=2).save_pretrained(tmp_path / "peft")
    saved = read_prefix(tmp_path / "peft")
    config = {name: saved.config[name] for name in ("base_fingerprint", "task_type", "num_frozen_tokens")}
    written = write_prefix(tmp_path / "written", saved.layers, saved.modules, **config)
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (saved.path, written.path)]
    assert weights[0] == weights[1]
    assert written.config.items() <= saved.config.items()
    assert sorted(path.name for path in written.path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_adapter_may_replace_itself(tmp_path):
    with_prefix(tiny_model("llama")).save_pretrained(tmp_path)
    before = read_prefix(tmp_path)
    copies = {index: LayerKV(*(state.clone() for state in kv)) for index, kv in before.layers.items()}
    export_to_peft(before, tmp_path)
    after = import_from_peft(tmp_path, tmp_path, tiny_model("llama"))
    assert (after.digest, after.peft_type) == (before.digest, "PREFIX_EXT")
    assert all(torch.equal(a, b) for index, kv in copies.items() for a, b in zip(kv, after.layers[index], strict=True))


@pytest.mark.parametrize("damage", [lambda kv: kv.key.fill_(float("nan")), lambda kv: kv.value.resize_(2, 6, 16)])
def test_what_is_not_a_prefix_is_not_written(damage, tmp_path):
    with_prefix(tiny_model("llama")).save_pretrained(tmp_path / "good")
    good = read_prefix(tmp_path / "good")
    layers = {index: LayerKV(*(state.clone() for state in kv)) for index, kv in good.layers.items()}
    damage(layers[1])
    with pytest.raises(PrefixCheckpointError, match=r"layer 1 .* holds NaN or Inf|do not fit together"):
        write_prefix(tmp_path / "bad", layers, good.modules)


@settings(max_examples=40)
@given(
    num_layers=st.integers(1, 4),
    heads=st.integers(1, 3),
    p=st.integers(1, 5),
    head_dim=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_any_uniform_prefix_survives_the_flat_layout(tmp_path_factory, num_layers, heads, p, head_dim, dtype):
    folder = tmp_path_factory.mktemp("any")
    layers = {i: LayerKV(*torch.randn(2, heads, p, head_dim, dtype=dtype)) for i in range(num_layers)}
    ours = write_prefix(folder, layers, {i: f"h.{i}" for i in layers}, task_type="CAUSAL_LM")
    stock = export_to_peft(ours, folder / "stock")
    assert same_kv(ours, stock)
    assert (stock.num_virtual_tokens, stock.num_bytes) == (p, 2 * num_layers * heads * p * head_dim * dtype.itemsize)
    shutil.rmtree(folder)
