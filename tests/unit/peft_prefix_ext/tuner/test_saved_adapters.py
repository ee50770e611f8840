"""An adapter that was trained on another architecture is refused."""

from __future__ import annotations

import pytest
from peft import PeftModel

from helpers.prefixed import trained_model
from helpers.tiny import tiny_model


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 2},
        {"hidden_size": 128},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    ],
)
def test_another_base_is_refused(change, tmp_path):
    trained_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was trained on another base model"):
        PeftModel.from_pretrained(tiny_model("llama", **change), tmp_path)


@pytest.mark.parametrize("window", [None, 16])
def test_another_sliding_window_is_refused(window, tmp_path):
    trained_model("mistral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"sliding_window is 24 in the adapter and {window} in the model"):
        PeftModel.from_pretrained(tiny_model("mistral", sliding_window=window), tmp_path)
