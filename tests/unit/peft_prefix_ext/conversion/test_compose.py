"""Concatenated prefixes: what is exact with `keep` and with `shift`."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import DynamicCache

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixCheckpointError, compose, read_prefix, write_prefix
from peft_prefix_ext.base_model.layers import record_layers
from peft_prefix_ext.checkpoint.format import LayerKV

IDS = random_ids(1, 9)
EAGER = ("gptj", "gpt_oss")
# Each way to turn keys: all entries or a part, halves or neighbours, by layer, in some layers, scaled, or as values.
TURNING = ["llama", "phi", "gptj", "cohere2", "glm4", "gemma3", "smollm3", "gpt_oss", "deepseek_v3", "lfm2"]


def base_of(name, **overrides):
    return tiny_model(name, attention="eager" if name in EAGER else "sdpa", **overrides)


def write_text(folder, base, token_ids, **config):
    """Writes the prefix that these tokens are: the K/V of a prefill."""
    probed = record_layers(base, token_ids)
    layers, modules = {row.index: row.kv for row in probed}, {row.index: row.module for row in probed}
    return write_prefix(folder, layers, modules, task_type="CAUSAL_LM", **config)


def logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **inputs).logits


def same(one, other):
    return one.layers.keys() == other.layers.keys() and all(
        torch.equal(a, b) for index in one.layers for a, b in zip(one.layers[index], other.layers[index], strict=True)
    )


def assert_close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0.0)


@pytest.mark.parametrize("name", TURNING)
def test_shifted_texts_equal_the_concatenated_texts(name, tmp_path):
    """The first text is exact in every layer; of the second, what does not depend on having read the first."""
    base = base_of(name)
    texts = [random_ids(length, seed=length).tolist() for length in (5, 11, 3)]
    for number, text in enumerate(texts):
        write_text(tmp_path / str(number), base, text)
    composed = compose([tmp_path / str(number) for number in range(3)], tmp_path / "all", "shift", base)
    whole = {row.index: row.kv for row in record_layers(base, [*chain(*texts)])}
    for index, kv in whole.items():
        for found, expected in zip(composed.layers[index], kv, strict=True):
            assert_close(found[:, :5], expected[:, :5])
            if index == 0:
                assert_close(found, expected)
    # Each text read alone, at its place among the others.
    places = [(texts[1], 5), (texts[2], 16)]
    for text, start in places:
        positions = torch.arange(start, start + len(text))[None]
        for row in record_layers(base, text, position_ids=positions):
            for found, expected in zip(composed.layers[row.index], row.kv, strict=True):
                assert_close(found[:, start : start + len(text)], expected)


@pytest.mark.parametrize("positions", ["keep", "shift"])
def test_logits_equal_those_of_the_concatenated_cache(positions, tmp_path):
    base = tiny_model("llama")
    for seed, length in ((1, 4), (2, 6)):
        with_prefix(tiny_model("llama"), seed=seed, num_virtual_tokens=length).save_pretrained(tmp_path / str(seed))
    sources = [tmp_path / "1", tmp_path / "2"]
    composed = compose(sources, tmp_path / "both", positions, base if positions == "shift" else None)
    assert composed.num_virtual_tokens == 10
    one, two = (read_prefix(source) for source in sources)
    rotary = base.model.rotary_emb
    cosine, sine = rotary(torch.zeros(1), torch.tensor([[4 if positions == "shift" else 0]]))
    cache = DynamicCache()
    for index in range(3):
        key = two.layers[index].key
        turned = key * cosine + torch.cat([-key[..., 8:], key[..., :8]], dim=-1) * sine
        keys = torch.cat([one.layers[index].key, turned], dim=1)
        values = torch.cat([one.layers[index].value, two.layers[index].value], dim=1)
        cache.update(keys[None], values[None], index)
    expected = logits(base, past_key_values=cache)
    assert_close(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "both")), expected)


def test_a_shifted_prefix_is_as_far_from_the_text_as_alone(tmp_path):
    """Attention sees distances: behind a prefix that nothing attends to, the second one acts as if it were alone."""
    base = tiny_model("llama")
    alone = with_prefix(tiny_model("llama"), num_virtual_tokens=6)
    alone.save_pretrained(tmp_path / "alone")
    expected = logits(alone)
    one = compose([tmp_path / "alone"], tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "again")
    assert torch.equal(logits(again), expected)
    for positions, tolerance in (("keep", None), ("shift", 1e-5)):
        behind = compose([one, one], tmp_path / positions, positions, base)
        # Without the first six: a hole, over which real tokens still start at 12.
        cache = DynamicCache()
        for index, kv in behind.layers.items():
            cache.update(kv.key[None, :, 6:], kv.value[None, :, 6:], index)
        found = logits(base, past_key_values=cache, position_ids=torch.arange(12, 12 + IDS.shape[1])[None])
        if tolerance is None:
            assert not torch.allclose(found, expected, atol=1e-2)
        else:
            assert_close(found, expected, tolerance)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_learned_positions_cannot_be_moved(name, tmp_path):
    with_prefix(base_of(name)).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match=f"model type '{name}'.*: compose with `positions='keep'`"):
        compose([tmp_path / "one", tmp_path / "one"], tmp_path / "both", "shift", base_of(name))
    compose([tmp_path / "one", tmp_path / "one"], tmp_path / "both")
    assert logits(PeftModel.from_pretrained(base_of(name), tmp_path / "both")).isfinite().all()


def test_frequencies_that_depend_on_the_length(tmp_path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 8.0}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    base = tiny_model("llama", rope_parameters=rope)
    one = write_text(tmp_path / "one", base, random_ids(20).tolist())
    compose([one, one], tmp_path / "within", "shift", base)
    with pytest.raises(ValueError, match="does not place what layer 0 caches by a rotation"):
        compose([one, one, one, one], tmp_path / "beyond", "shift", base)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_a_shift_beyond_the_last_position_is_refused(name, tmp_path):
    base = base_of(name, max_position_embeddings=32)
    one = write_text(tmp_path / "one", base, random_ids(16).tolist())
    compose([one, one], tmp_path / "both", "shift", base)
    with pytest.raises(ValueError, match="has 32 positions, which 48 virtual tokens do not fit into"):
        compose([one, one, one], tmp_path / "three", "shift", base)


def test_in_bfloat16_it_is_exact_up_to_bfloat16(tmp_path):
    base = tiny_model("llama").bfloat16()
    texts = [random_ids(6, seed=seed).tolist() for seed in (1, 2)]
    sources = [write_text(tmp_path / str(number), base, text) for number, text in enumerate(texts)]
    composed = compose(sources, tmp_path / "both", "shift", base)
    whole = record_layers(base, [*chain(*texts)])[0].kv
    assert composed.layers[0].key.dtype == torch.bfloat16
    assert_close(composed.layers[0].key, whole.key, 2e-2)
    assert torch.equal(composed.layers[0].value, whole.value)


def test_stock_and_own_prefixes_compose_and_continue_training(tmp_path):
    with_prefix(tiny_model("llama"), num_virtual_tokens=4, num_frozen_tokens=2).save_pretrained(tmp_path / "ours")
    for name, stock in (("flat", PrefixTuningConfig), ("cartridge", CartridgeConfig)):
        model = get_peft_model(tiny_model("llama"), stock(task_type="CAUSAL_LM", num_virtual_tokens=3))
        model.save_pretrained(tmp_path / name)
    sources = [tmp_path / name for name in ("ours", "flat", "cartridge")]
    composed = compose(sources, tmp_path / "all")
    assert (composed.peft_type, composed.num_virtual_tokens) == ("PREFIX_EXT", 10)
    assert composed.config["task_type"] == "CAUSAL_LM"
    assert (
        composed.config["init_report"]
        == "10 virtual tokens: prefixes of 4 + 3 + 3 behind one another, positions 'keep'"
    )
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "all", is_trainable=True)
    assert model.get_base_model().get_submodule(composed.modules[0]).prefix_ext.prefix_ext_key["default"].shape[1] == 8
    with pytest.raises(ValueError, match=r"`base_model` \(`--base`\) must be given"):
        compose(sources[1:], tmp_path / "stock")
    assert compose(sources[1:], tmp_path / "stock", base_model=tiny_model("llama")).modules == composed.modules


def test_a_prefix_on_the_base_model_does_not_change_the_rotation(tmp_path):
    base = tiny_model("llama")
    one = write_text(tmp_path / "one", base, random_ids(5).tolist())
    expected = compose([one, one], tmp_path / "before", "shift", base)
    live = with_prefix(base)
    assert same(compose([one, one], tmp_path / "after", "shift", live.get_base_model()), expected)
    assert live.active_adapter == "default"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers is 3 in the adapter and 2"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 2 in the adapter and 4"),
        ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, "rope_parameters.rope_theta is 10000.0"),
    ],
)
def test_prefixes_of_other_bases_are_refused(change, message, tmp_path):
    with_prefix(tiny_model("llama")).save_pretrained(tmp_path / "one")
    with_prefix(tiny_model("llama", **change)).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=f"were trained on different base models.*{message}"):
        compose([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    with pytest.raises(PrefixCheckpointError, match=f"was trained on another base model.*{message}"):
        compose([tmp_path / "one"], tmp_path / "both", "shift", tiny_model("llama", **change))
    assert not (tmp_path / "both").exists()


def test_other_weights_warn(tmp_path):
    one = write_text(tmp_path / "one", tiny_model("llama"), [2, 3], base_model_name_or_path="owner/one")
    two = write_text(tmp_path / "two", tiny_model("llama"), [2, 3], base_model_name_or_path="owner/two")
    with pytest.warns(UserWarning, match="trained on owner/one and owner/two"):
        assert compose([one, two], tmp_path / "both").base_model_name_or_path == "owner/one"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "`sources` must be a list of prefixes, got \\[\\]"),
        (("one",), "`sources` must be a list of prefixes, got 'one'"),
        ((["one"], "turn"), "`positions` must be one of \\('keep', 'shift'\\), got 'turn'"),
        ((["one"], "shift"), "`base_model` must be given with `positions='shift'`"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    sources, *more = arguments
    with pytest.raises(ValueError, match=message):
        compose(sources, tmp_path, *more)


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 4), min_size=3, max_size=3), seed=st.integers(0, 999))
def test_keep_is_associative_and_lengths_add_up(tmp_path_factory, lengths, seed):
    folder = tmp_path_factory.mktemp("any")
    generator = torch.Generator().manual_seed(seed)

    def layers(p):
        return {index: LayerKV(*torch.randn(2, 2, p, 4, generator=generator)) for index in (0, 2)}

    a, b, c = (write_prefix(folder / str(number), layers(p), {0: "h.0", 2: "h.2"}) for number, p in enumerate(lengths))
    left = compose([compose([a, b], folder / "ab"), c], folder / "ab-c")
    right = compose([a, compose([b, c], folder / "bc")], folder / "a-bc")
    whole = compose([a, b, c], folder / "abc")
    assert left.digest == right.digest == whole.digest
    assert whole.num_virtual_tokens == sum(lengths)
    assert same(compose([b], folder / "b"), b)
    # In place of one of its sources, which is still mapped from the file that is replaced.
    assert compose([a, b, c], folder / "0").digest == whole.digest
