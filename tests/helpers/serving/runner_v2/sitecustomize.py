"""vLLM's defaults on a GPU, on CPU: model runner V2 and async scheduling, with interpreted Triton kernels.

It applies to all processes that start with `ENVIRONMENT`, which puts this folder on Python's path: Python imports a
module of this name when it starts. Model runner V2 supports CPUs through builds of Triton that compile for them.
Triton's own interpreter, which every build has, runs the same kernels slowly.
"""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import wrapt

ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parent),
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}


def _add_cpu(backends: Any) -> None:
    """Makes vLLM use Triton on CPU, which needs a backend of this name. It is inactive, so nothing is compiled for it."""
    backends.backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: False))


def _leave_out(sampler: Any) -> None:
    """Disables the one kernel that the interpreter does not support: `tl.range` yields numbers instead of tensors."""
    sampler.HAS_TRITON = False


def _keep_async_scheduling(platform: Any) -> None:
    """Keeps async scheduling, which vLLM disables on CPU."""

    def keep(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        scheduler = args[0].scheduler_config
        wanted = scheduler.async_scheduling
        wrapped(*args, **kwargs)
        scheduler.async_scheduling = wanted

    wrapt.wrap_function_wrapper(platform, "CpuPlatform.check_and_update_config", keep)


if all(os.environ.get(name) == value for name, value in ENVIRONMENT.items()):
    wrapt.register_post_import_hook(_add_cpu, "triton.backends")
    wrapt.register_post_import_hook(_leave_out, "vllm.v1.sample.ops.topk_topp_sampler")
    wrapt.register_post_import_hook(_keep_async_scheduling, "vllm.platforms.cpu")
