"""A pytest plugin that fails the session unless engines ran with model runner V2 and scheduled steps ahead."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import wrapt

_steps_ahead = 0


def pytest_sessionstart() -> None:
    wrapt.wrap_function_wrapper("vllm.v1.core.sched.async_scheduler", "AsyncScheduler.schedule", _count_steps_ahead)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Nothing else imports the runner.
    if "vllm.v1.worker.cpu.model_runner" not in sys.modules or not _steps_ahead:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        raise pytest.UsageError("No engine ran with model runner V2 and async scheduling.")


def _count_steps_ahead(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    global _steps_ahead
    _steps_ahead += any(request.num_output_placeholders for request in instance.running)
    return wrapped(*args, **kwargs)
