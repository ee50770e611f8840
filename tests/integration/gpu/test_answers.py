"""Answers on a GPU: every token in float32, and log-probabilities in half precision, by every path that an engine can take.

Each engine is a process of its own, the one that `python -m benchmarks.gpu` runs as well: prompts of several lengths with
prefixes of several lengths beside the base model, with an empty and a full cache, and after a reset or a sleep.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.plan import EXACT
from helpers.scripts import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

TRITON = {"attention_backend": "TRITON_ATTN"}
WITHOUT_COMPILER = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
IN_STEPS = {"async_scheduling": False}


def check(
    folder: Path,
    model: str,
    dtype: str,
    options: Mapping[str, Any],
    *flags: str,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs one engine and returns what was found."""
    command = [sys.executable, "-m", "benchmarks.gpu.steps.parity", "--model", model, "--dtype", dtype]
    environment = {**os.environ, **(EXACT if dtype == "float32" else {}), **(variables or {})}
    done = subprocess.run(
        [*command, "--options", json.dumps(options), *flags, "--out", str(folder / "found.json")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    out = folder / "found.json"
    found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else None
    assert found is not None, done.stdout[-3000:] + done.stderr[-6000:]
    assert found["ok"], found
    return dict(found)


@pytest.mark.parametrize(
    "options",
    [{}, IN_STEPS, WITHOUT_COMPILER, {"enforce_eager": True}, {"max_num_batched_tokens": 128, "max_num_seqs": 8}],
    ids=["defaults", "no async scheduling", "graphs without compiler", "eager", "chunks"],
)
def test_every_token_in_float32(tmp_path: Path, options: dict[str, Any]) -> None:
    facts = check(tmp_path, "llama", "float32", options)["facts"]
    assert facts["async_scheduling"] == (options != IN_STEPS)
    assert ("FULL" in facts["cudagraph_mode"]) == ("enforce_eager" not in options)


@pytest.mark.parametrize("model", ["qwen3", "mistral", "gemma3"])
def test_every_token_of_other_models_in_float32(tmp_path: Path, model: str) -> None:
    check(tmp_path, model, "float32", {})


@pytest.mark.parametrize("runner", ["0", "1"], ids=["runner V1", "runner V2"])
def test_both_model_runners(tmp_path: Path, runner: str) -> None:
    found = check(tmp_path, "llama", "float32", {}, variables={"VLLM_USE_V2_MODEL_RUNNER": runner})
    assert found["facts"]["model_runner_v2"] == (runner == "1")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {}),
        ("llama", TRITON),
        ("llama", {"kv_cache_dtype": "fp8", **TRITON}),
        ("hybrid", {}),
        ("gated delta", {}),
        ("MLA", {"block_size": 64}),
    ],
    ids=["defaults", "Triton", "fp8 cache", "hybrid", "gated delta", "MLA"],
)
def test_log_probabilities_in_bfloat16(tmp_path: Path, model: str, options: dict[str, Any]) -> None:
    check(tmp_path, model, "bfloat16", options)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_flash_attention_3(tmp_path: Path, cache: str) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("FlashAttention 3 needs a Hopper GPU")
    flash = {"attention_config": {"backend": "FLASH_ATTN", "flash_attn_version": 3}}
    check(tmp_path, "llama", "bfloat16", {**flash, "kv_cache_dtype": cache})


def test_after_sleep(tmp_path: Path) -> None:
    check(tmp_path, "llama", "bfloat16", {}, "--sleep")


def test_no_step_waits_for_the_gpu(tmp_path: Path) -> None:
    """vLLM's own check raises in a step that waits, or that copies from memory that is not pinned."""
    check(tmp_path, "llama", "bfloat16", {}, variables={"VLLM_GPU_SYNC_CHECK": "error"})
