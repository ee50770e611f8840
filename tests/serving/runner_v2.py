"""What vLLM runs by default on a GPU, on a CPU: model runner V2 and async scheduling, its Triton kernels interpreted.

    python -m pytest -p serving.runner_v2 tests/serving/test_engine.py

Model runner V2 has a form for CPUs, for builds of Triton that compile for them; Triton's own interpreter, which every build
has, runs the same kernels, slowly. Only engines in the process of the tests are run so.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import pytest

# Both are read when Triton and vLLM are imported, which is later.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from triton.backends import backends

# vLLM uses Triton on a CPU if it has a backend of this name.
backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]
steps_ahead = 0


def pytest_sessionstart() -> None:
    import wrapt
    from vllm.v1.sample.ops import topk_topp_sampler

    # The one kernel that the interpreter does not take: `tl.range` gives it numbers that are no tensors.
    topk_topp_sampler.HAS_TRITON = False
    wrapt.wrap_function_wrapper("vllm.platforms.cpu", "CpuPlatform.check_and_update_config", _keep_async_scheduling)
    wrapt.wrap_function_wrapper("vllm.v1.core.sched.async_scheduler", "AsyncScheduler.schedule", _count_steps_ahead)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails where something else ran: nothing else imports the runner, and nothing else is a step ahead."""
    if "vllm.v1.worker.cpu.model_runner" not in sys.modules or not steps_ahead:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        raise pytest.UsageError("No engine ran with model runner V2 and async scheduling.")


def _keep_async_scheduling(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """vLLM switches it off on CPUs, where it gains nothing."""
    scheduler = args[0].scheduler_config
    wanted = scheduler.async_scheduling
    wrapped(*args, **kwargs)
    scheduler.async_scheduling = wanted


def _count_steps_ahead(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    global steps_ahead
    steps_ahead += any(request.num_output_placeholders for request in instance.running)
    return wrapped(*args, **kwargs)
