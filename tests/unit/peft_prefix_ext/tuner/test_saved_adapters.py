"""An adapter that was trained on another architecture is refused."""

from __future__ import annotations

import pytest
import torch
import wrapt
from peft import PeftModel

from helpers.prefixed import prefix_kv, trained_model
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


def test_load_adapter_behind_a_wrapper_of_another_program(tmp_path, monkeypatch):
    """ms-swift has its own, which passes on whatever it gets: the arguments have no names there."""
    model = trained_model()
    model.save_pretrained(str(tmp_path))
    ours = PeftModel.load_adapter
    theirs = ours.__wrapped__

    def passing_on(self, model_id, *args, **kwargs):
        return theirs(self, model_id, *args, **kwargs)

    monkeypatch.setattr(PeftModel, "load_adapter", wrapt.FunctionWrapper(passing_on, ours._self_wrapper))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert prefix_kv(loaded).keys() == prefix_kv(model).keys()
    loaded.load_adapter(str(tmp_path), adapter_name="again")
    for name, expected in prefix_kv(model).items():
        assert torch.equal(prefix_kv(loaded)[name], expected)
        assert torch.equal(prefix_kv(loaded, "again")[name], expected)
