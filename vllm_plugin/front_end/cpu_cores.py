"""On a CPU, the cores that vLLM computes with: as many with prefixes as without.

For each worker vLLM keeps one core free for the scheduler, and another one if there is a KV connector, since some copy K/V
in threads of their own. Ours does not.
"""

from __future__ import annotations

import os
from typing import Any

import psutil

from vllm_plugin.adapters.spec import CONNECTOR

VARIABLE = "VLLM_CPU_NUM_OF_RESERVED_CPU"


def keep_cores(vllm_config: Any) -> None:
    """Has the workers that this process starts leave no core to our connector, if the operator has not said otherwise."""
    from vllm.platforms import current_platform

    ours_alone = vllm_config.kv_transfer_config.kv_connector == CONNECTOR
    if not (current_platform.is_cpu() and ours_alone) or VARIABLE in os.environ:
        return
    workers = vllm_config.parallel_config.local_world_size
    # Where there are no more cores than it would keep free, vLLM computes with all of them.
    if _num_cores() > 2 * workers:
        os.environ[VARIABLE] = str(workers)


def _num_cores() -> int:
    """Returns how many physical cores this process may use, at most."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, psutil.cpu_count(logical=False) or 1)
