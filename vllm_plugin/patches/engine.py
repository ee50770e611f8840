"""Patches of the scheduler, the worker's batch and the metrics, in processes that serve prefixes."""

from __future__ import annotations

import functools
from typing import Any

from vllm_plugin.front_end import adapters_in_use
from vllm_plugin.front_end.requests import has_prefix
from vllm_plugin.kv_transfer_config import CONNECTOR, settings_in
from vllm_plugin.patches.arguments import argument
from vllm_plugin.patches.patch import MethodPatch
from vllm_plugin.scheduler import load_failures, prompt_logprobs
from vllm_plugin.worker import logits_processors


def _new_scheduler(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """Frees blocks at once, as without a connector, so that a running engine can reset its prefix cache.

    With async scheduling vLLM defers it, since some connectors load into a block while a step still writes to it. Ours
    loads on the stream of the steps.
    """
    wrapped(*args, **kwargs)
    config = instance.vllm_config.kv_transfer_config
    if config is not None and config.kv_connector == CONNECTOR:
        instance.defer_block_free = False


def _handle_invalid_blocks(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Fails the requests of a failed load. vLLM's own method ends the engine if layers form several KV cache groups."""
    if settings_in(instance.vllm_config.kv_transfer_config) is None:
        return wrapped(*args, **kwargs)
    invalid = kwargs["invalid_block_ids"] if "invalid_block_ids" in kwargs else args[0]
    return load_failures.fail_requests(instance, invalid, functools.partial(wrapped, *args, **kwargs))


def _num_blocks_to_allocate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> int:
    """Counts the block that a load takes in recurrent layers.

    vLLM caps what a request takes there at one block for the state that the step writes. The state behind the loaded tokens
    has another one, so that the engine ended when the pool was just too small for both.
    """
    num_blocks: int = wrapped(*args, **kwargs)
    loaded, found = (
        argument(wrapped, args, kwargs, name) for name in ("total_computed_tokens", "num_local_computed_tokens")
    )
    return num_blocks + (instance.mamba_cache_mode == "align" and loaded > found)


def _register_add_request(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    index = wrapped(*args, **kwargs)
    logits_processors.show_real_prompt(instance, argument(wrapped, args, kwargs, "request"))
    return index


def _new_state(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    state = wrapped(*args, **kwargs)
    request = kwargs["request"] if "request" in kwargs else args[1]
    if has_prefix(request):
        adapters_in_use.name_adapter(state, request)
    return state


def _new_prometheus_logger(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    wrapped(*args, **kwargs)
    adapters_in_use.add_gauge(instance)


def _record(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    adapters_in_use.forget_sets(instance, kwargs["scheduler_stats"] if "scheduler_stats" in kwargs else args[0])
    wrapped(*args, **kwargs)


def _update_from_output(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    output = kwargs["model_runner_output"] if "model_runner_output" in kwargs else args[1]
    if output.prompt_logprobs_dict:
        prompt_logprobs.keep_real_rows(instance.requests, output.prompt_logprobs_dict)
    return wrapped(*args, **kwargs)


_SCHEDULER, _LOGGERS = "vllm.v1.core.sched.scheduler", "vllm.v1.metrics.loggers"
ENGINE_PATCHES = (
    MethodPatch(
        "vllm.v1.engine.output_processor", "RequestState.from_new_request", ("tokenizer", "request"), _new_state
    ),
    MethodPatch(_LOGGERS, "PrometheusStatLogger.__init__", ("vllm_config",), _new_prometheus_logger),
    MethodPatch(_LOGGERS, "PrometheusStatLogger.record", ("scheduler_stats",), _record),
    MethodPatch(_SCHEDULER, "Scheduler.__init__", ("vllm_config",), _new_scheduler),
    MethodPatch(
        _SCHEDULER, "Scheduler.update_from_output", ("scheduler_output", "model_runner_output"), _update_from_output
    ),
    MethodPatch(_SCHEDULER, "Scheduler._handle_invalid_blocks", ("invalid_block_ids",), _handle_invalid_blocks),
    MethodPatch(
        "vllm.v1.core.single_type_kv_cache_manager",
        "MambaManager.get_num_blocks_to_allocate",
        ("total_computed_tokens", "num_local_computed_tokens"),
        _num_blocks_to_allocate,
    ),
    MethodPatch(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch._register_add_request",
        ("request",),
        _register_add_request,
    ),
)
