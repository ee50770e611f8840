"""The comparison that decides whether an adapter fits a base model."""

from __future__ import annotations

import subprocess
import sys

from peft_prefix_ext.checkpoint.compatibility import (
    LayerDifference,
    LayerShape,
    compare_layers,
    layers_in_words,
    other_base_model,
)
from peft_prefix_ext.checkpoint.fingerprint import differences

LAYERS = [LayerShape(0, 2, 16, 16), LayerShape(1, 2, 16, 8)]


def test_layers_fit_plain_tuples_in_any_order():
    assert compare_layers(LAYERS, [tuple(layer) for layer in reversed(LAYERS)]) == []
    assert layers_in_words([]) == []


def test_a_layer_of_another_shape():
    (found,) = compare_layers(LAYERS, [LAYERS[0], (1, 4, 16, 8)])
    assert found == LayerDifference(1, LAYERS[1], LayerShape(1, 4, 16, 8))
    assert str(found) == "layer 1 has 2 KV heads of sizes (16, 8), the model has 4 of sizes (16, 8)"
    assert layers_in_words([found]) == [str(found)]


def test_layers_of_one_side_only():
    found = compare_layers(LAYERS, [LAYERS[0], (2, 2, 16, 16)])
    assert [str(each) for each in found] == [
        "layer 1 has no KV cache in the model",
        "layer 2 has no prefix in the adapter",
    ]
    assert layers_in_words(found) == ["the layers with a KV cache differ (without a prefix: [2], without a cache: [1])"]


def test_a_part_of_the_model_needs_only_its_own_layers():
    assert compare_layers(LAYERS, LAYERS[:1], whole_model=False) == []
    assert [each.layer for each in compare_layers(LAYERS[:1], LAYERS, whole_model=False)] == [1]


def test_architectures_and_layers_in_words():
    other = [(0, 4, 16, 16)]
    assert differences({"hidden_size": 8}, {"hidden_size": 4}) == ["hidden_size is 8 in the adapter and 4 in the model"]
    assert differences({}, {"hidden_size": 4}) == []  # a stock adapter has no fingerprint
    assert layers_in_words(compare_layers(LAYERS, other)) == [
        "the layers with a KV cache differ (without a prefix: [], without a cache: [1])"
    ]
    assert layers_in_words(compare_layers(LAYERS[:1], other)) == [
        "layer 0 has 2 KV heads of sizes (16, 16), the model has 4 of sizes (16, 16)"
    ]
    assert layers_in_words(compare_layers(LAYERS, LAYERS[:1], whole_model=False)) == []


def test_the_sentence_of_an_error():
    assert other_base_model("Prefix adapter 'x'", "owner/base", ["a", "b"]) == (
        "Prefix adapter 'x' was trained on another base model (owner/base): a; b."
    )
    assert "(name not recorded)" in other_base_model("Prefix adapter 'x'", None, ["a"])


def test_it_needs_no_torch():
    code = (
        "import sys; import peft_prefix_ext.checkpoint.compatibility; "
        "print(sorted({'torch', 'peft', 'transformers', 'vllm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
