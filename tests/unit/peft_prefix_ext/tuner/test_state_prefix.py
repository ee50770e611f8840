"""States of recurrent layers from their source to the file and back."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import DynamicCache

from helpers.prefixed import perturb, state_layers, with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig, compose, export_to_peft
from peft_prefix_ext.checkpoint.reader import read_prefix
from peft_prefix_ext.conversion.verify import verify

TEXT = [1, 5, 17, 40, 23, 99, 64]
IDS = random_ids(2, 9)


@pytest.fixture(scope="module")
def base():
    return tiny_model("qwen3_next")


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def after_text(base, ids=TEXT):
    return base(input_ids=torch.cat([torch.tensor([ids]).expand(2, -1), IDS], dim=1)).logits[:, len(ids) :]


def started(base, **config):
    return get_peft_model(
        copy.deepcopy(base),
        PrefixExtConfig(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": len(TEXT), "reparam": "none", **config}),
    ).eval()


def all_states(model):
    layers = state_layers(model)
    return [layer.state(kind, number)["default"] for layer in layers for kind, number in layer.states]


@torch.no_grad()
def test_a_cache_gives_its_states_and_a_list_none(base):
    cache = DynamicCache(config=base.config)
    base(input_ids=torch.tensor([TEXT]), past_key_values=cache)
    torch.testing.assert_close(logits(started(base, init_kv=cache)), after_text(base), atol=1e-4, rtol=1e-4)
    pairs = [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    model = started(base, init_kv=pairs)
    assert all(not state.any() for state in all_states(model))
    assert model.peft_config["default"].init_report.endswith("given K/V, states of recurrent layers zero")


@pytest.mark.parametrize("reparam", ["none", "mlp"])
def test_a_trained_prefix_is_saved_loaded_and_trained_on(base, reparam, tmp_path):
    model = with_prefix(copy.deepcopy(base), reparam=reparam, layers_to_train=[0, 1, 3])
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["format_version"] == 2
    assert {row["kind"] for row in config["prefix_states"]} == {"conv", "recurrent"}
    assert all(row["dtype"] == "float32" for row in config["prefix_states"])
    torch.testing.assert_close(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), expected)
    resumed = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(logits(resumed), expected)
    assert any(p.requires_grad for p in state_layers(resumed)[0].parameters())
    perturb(resumed)
    assert not torch.allclose(logits(resumed), expected, atol=0.05)
    assert len(list(verify(tmp_path, copy.deepcopy(base)))) == 4


def test_an_adapter_of_an_earlier_release_stays_one_of_attention_layers(base, tmp_path):
    model = with_prefix(copy.deepcopy(base), state_prefix=False)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["format_version"] == 1
    assert not {"state_prefix", "prefix_states"} & config.keys()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not state_layers(loaded)
    assert torch.equal(logits(loaded), expected)
    assert not read_prefix(tmp_path).states


def test_another_adapter_gives_its_states(base, tmp_path):
    one, two = (with_prefix(copy.deepcopy(base), seed=seed) for seed in (1, 2))
    for number, model in enumerate((one, two)):
        model.save_pretrained(tmp_path / str(number))
    sources = [str(tmp_path / "0"), str(tmp_path / "1")]
    torch.testing.assert_close(logits(started(base, init_adapter=sources[0])), logits(one))
    for mean, *states in zip(
        all_states(started(base, init_adapter=sources)), all_states(one), all_states(two), strict=True
    ):
        torch.testing.assert_close(mean, sum(states) / 2)
    keys = started(base, init_adapter=sources[0], init_adapter_part="keys")
    assert all(not state.any() for state in all_states(keys))
    assert "states of recurrent layers zero" in keys.peft_config["default"].init_report


def test_states_are_neither_composed_nor_exported(base, tmp_path):
    model = with_prefix(copy.deepcopy(base))
    with pytest.raises(
        ValueError, match="cannot be put behind one another: train prefixes to compose with `state_prefix"
    ):
        compose([model, model], tmp_path)
    with pytest.raises(ValueError, match="stock PEFT, which has no states of recurrent layers"):
        export_to_peft(model, tmp_path)


def test_states_of_another_shape_are_refused(base, tmp_path):
    model = with_prefix(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["prefix_states"][0]["shape"] = [7, 3]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layer 0 has a conv state"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_a_mamba_1_hybrid_has_no_states_and_says_so():
    with pytest.warns(UserWarning, match="only its attention layers have a prefix"):
        model = with_prefix(tiny_model("jamba"))
    assert not state_layers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_prefix(tiny_model("jamba"), state_prefix=False)


def test_recurrent_layers_alone_need_their_states():
    with pytest.raises(ValueError, match="no attention layer to give a prefix to, and `state_prefix` is False"):
        with_prefix(tiny_model("mamba2", attention="eager"), state_prefix=False)
