"""Runs the tests of engines again with vLLM's defaults on a GPU: model runner V2 and async scheduling."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.scripts import ROOT
from helpers.serving.runner_v2.sitecustomize import ENVIRONMENT

UNIT = "tests/unit/vllm_plugin"
ENGINES = "tests/integration/serving"
ALL = [
    f"{ENGINES}/test_engine.py",
    f"{ENGINES}/test_load_failures.py",
    f"{ENGINES}/test_offloading.py",
    f"{ENGINES}/test_requests.py",
    f"{ENGINES}/test_offline_loading.py",
    f"{ENGINES}/test_isolation.py",
    f"{ENGINES}/test_hybrids.py",
    f"{ENGINES}/test_architectures.py::test_same_tokens_after_chunks_preemption_and_reset",
    f"{ENGINES}/test_logits_processors.py",
    f"{ENGINES}/test_multimodal.py",
    f"{UNIT}/scheduler/test_prompt_logprobs.py",
    f"{UNIT}/scheduler/test_scheduler.py",
]
SHORT = [
    f"{ENGINES}/test_engine.py::test_matches_transformers_cold_warm_and_after_reset",
    f"{ENGINES}/test_engine.py::test_a_reset_with_requests_running_loads_again",
    f"{ENGINES}/test_load_failures.py::test_a_failed_load_fails_only_its_requests_and_leaves_nothing_in_the_cache",
    f"{ENGINES}/test_load_failures.py::test_aborted_requests_of_a_failed_load_leave_nothing_in_the_cache",
    f"{ENGINES}/test_logits_processors.py",
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tests", [SHORT, pytest.param(ALL, marks=pytest.mark.soak)])
def test_engines_with_model_runner_v2_and_async_scheduling(tests: list[str]) -> None:
    """They run in a process of their own, since Triton selects the runner's kernels when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "runs_ahead", *tests]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
