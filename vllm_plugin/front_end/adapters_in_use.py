"""`vllm:lora_requests_info` names the prefixes of running and waiting requests, as gateways read it of LoRA adapters.

It is the metric of the model server protocol of Kubernetes' gateway API inference extension, by which a gateway sends the
requests of an adapter to a replica that serves it already. vLLM has it with LoRA only, and counts a request by the name in its
state.
"""

from __future__ import annotations

from typing import Any

from vllm_plugin.adapters.spec import unpack
from vllm_plugin.kv_transfer_config import ADAPTERS, settings_in
from vllm_plugin.metrics import is_multiprocess

# vLLM's labels are all names at once, so a registry would keep each set of adapters that were ever in use together.
MAX_SETS = 64
_SETS = "prefix_adapter_sets"


def name_adapter(state: Any, request: Any) -> None:
    """Lets vLLM count a request by the name of its prefix.

    Args:
        state: vLLM's `RequestState` in the front end.
        request: The `EngineCoreRequest`, which has a prefix.
    """
    state.lora_name = unpack(request.sampling_params.extra_args["kv_transfer_params"][ADAPTERS]).name


def add_gauge(logger: Any) -> None:
    """Gives vLLM's `PrometheusStatLogger` of an engine with prefixes the metric that it has with LoRA only.

    Not with several API servers: each of them would show its own requests, and nothing can be forgotten there.
    """
    config = logger.vllm_config
    if settings_in(config.kv_transfer_config) is None or logger.gauge_lora_info is not None or is_multiprocess():
        return
    labels = ["max_lora", "waiting_lora_adapters", "running_lora_adapters"]
    logger.labelname_max_lora, logger.labelname_waiting_lora_adapters, logger.labelname_running_lora_adapters = labels
    # Each request may have a prefix of its own.
    logger.max_lora = config.scheduler_config.max_num_seqs
    logger.gauge_lora_info = logger._gauge_cls(
        name="vllm:lora_requests_info",
        documentation="Running stats on requests of LoRA and prefix adapters.",
        multiprocess_mode="sum",
        labelnames=labels,
    )


def forget_sets(logger: Any, scheduler_stats: Any) -> None:
    """Clears the metric before it gets the next set of adapters, if it has many. Call it before vLLM records a step."""
    gauge = logger.gauge_lora_info
    if gauge is None or scheduler_stats is None or is_multiprocess() or not hasattr(gauge, "clear"):
        return
    sets = logger.__dict__.setdefault(_SETS, set())
    sets.add((*scheduler_stats.running_lora_adapters, None, *scheduler_stats.waiting_lora_adapters))
    if len(sets) > MAX_SETS:
        gauge.clear()
        sets.clear()
