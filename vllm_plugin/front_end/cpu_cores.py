"""On CPU, vLLM computes with as many cores with prefixes as without.

vLLM reserves one core per worker for the scheduler, and a second one if there is a KV connector, since some connectors
copy K/V in threads of their own. Ours does not.
"""

from __future__ import annotations

import os
from typing import Any

import psutil

from vllm_plugin.kv_transfer_config import CONNECTOR

VARIABLE = "VLLM_CPU_NUM_OF_RESERVED_CPU"


def keep_cores(vllm_config: Any) -> None:
    """Keeps vLLM from reserving a core for our connector, unless the operator has set the number of reserved cores."""
    from vllm.platforms import current_platform

    only_ours = vllm_config.kv_transfer_config.kv_connector == CONNECTOR
    if not (current_platform.is_cpu() and only_ours) or VARIABLE in os.environ:
        return
    workers = vllm_config.parallel_config.local_world_size
    # With no more cores than it would reserve, vLLM computes with all of them.
    if _num_cores() > 2 * workers:
        os.environ[VARIABLE] = str(workers)


def _num_cores() -> int:
    """Returns an upper bound of the physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, psutil.cpu_count(logical=False) or 1)
