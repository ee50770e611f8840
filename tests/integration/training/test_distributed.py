"""Two processes, with DDP or sharded, train, distil and save the same adapter as one."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from helpers.prefixed import with_prefix
from helpers.scripts import run_script, torchrun
from helpers.tiny import random_ids, tiny_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder that two processes left."""
    folder = tmp_path_factory.mktemp("distributed")
    torchrun("distributed", folder)
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2", "fsdp2-lean"])
def test_two_processes_train_the_adapter_of_one(strategy, trained):
    settings = sorted(trained.iterdir())
    assert len(settings) == 8
    for setting in settings:
        alone, together = (load_file(setting / which / "adapter_model.safetensors") for which in ("alone", strategy))
        assert alone.keys() == together.keys()
        assert setting.name.startswith("states") == any("state" in key for key in alone)
        for key in alone:
            torch.testing.assert_close(together[key], alone[key], atol=1e-4, rtol=1e-3, msg=f"{setting.name} {key}")
    fresh = with_prefix(tiny_model("llama"), init_std=0.02)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), trained / "flat" / strategy)
    ids = random_ids(1, 5)
    assert not torch.allclose(loaded(input_ids=ids).logits, fresh(input_ids=ids).logits, atol=1e-3)


def test_two_processes_distil_the_adapter_of_one(tmp_path):
    torchrun("distil", tmp_path / "together", 2)
    run_script("distil", tmp_path / "alone", 4)
    together, alone = (
        load_file(tmp_path / which / "out" / "adapter_model.safetensors") for which in ("together", "alone")
    )
    for key in alone:
        torch.testing.assert_close(together[key], alone[key], atol=1e-4, rtol=1e-3, msg=key)
    # The answers were made once, and the report is of this training.
    assert (tmp_path / "together" / "work" / "targets.jsonl").read_text().count("\n") == 19
    assert (tmp_path / "together" / "out" / "report.md").exists()
