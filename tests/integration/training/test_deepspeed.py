"""Prefixes train, save and resume with DeepSpeed ZeRO."""

from __future__ import annotations

import json

import pytest

from helpers.scripts import run_script

CASES = [
    "mlp-3-early",
    "mlp-3-late",
    "flat-3-early",
    "flat-3-late",
    "part-3-late",
    "part-2-early",
    "flat-3-late-low",
    "flat-2-early-low",
    "flat-2-early",
    "states-3-early",
    "states-3-late",
    "states-2-early",
]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    run_script("deepspeed_zero", folder, *CASES)
    return {case: json.loads((folder / case / "losses.json").read_text()) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_resuming_and_loading_are_exact(case, losses):
    end, resumed, loaded = (losses[case][what] for what in ("end", "resumed", "loaded"))
    assert resumed == pytest.approx(end, abs=1e-5)
    assert loaded == pytest.approx(end, abs=1e-5)


@pytest.mark.parametrize("adapter", ["mlp", "flat", "states"])
def test_models_partitioned_at_creation_train_like_others(adapter, losses):
    assert losses[f"{adapter}-3-late"]["end"] == pytest.approx(losses[f"{adapter}-3-early"]["end"], abs=1e-5)


@pytest.mark.parametrize("case", ["flat-3-late", "flat-2-early"])
def test_a_low_learning_rate_is_raised(case, losses):
    """The optimizer has flat parts of DeepSpeed's instead of the parameters."""
    assert losses[f"{case}-low"]["end"] == pytest.approx(losses[case]["end"], abs=1e-5)
