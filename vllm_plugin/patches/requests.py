"""Every place where the plugin wraps a method of vLLM for requests, in processes that have prefixes."""

from __future__ import annotations

from typing import Any

from vllm_plugin.adapters import base_lora, runtime_loading
from vllm_plugin.adapters.spec import CONNECTOR
from vllm_plugin.front_end import logits_processors, prompt_logprobs, requests
from vllm_plugin.patches.arguments import all_arguments, argument
from vllm_plugin.patches.install import MethodPatch
from vllm_plugin.patches.server import SERVER_PATCHES
from vllm_plugin.scheduler.load_failures import handle_invalid_blocks

__all__ = ["ENGINE_PATCHES", "SERVER_PATCHES"]


def _process_inputs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    config = instance.vllm_config
    named = argument(wrapped, args, kwargs, "lora_request")
    if not requests.is_relevant(named, config):
        return wrapped(*args, **kwargs)
    params, max_model_len = argument(wrapped, args, kwargs, "params"), config.model_config.max_model_len
    if isinstance(named, requests.CheckedRequest):
        spec, checked = named.spec, True
    else:
        spec, checked = requests.check_call(named, argument(wrapped, args, kwargs, "prompt"), params, config)
    if spec is None:
        request = wrapped(*args, **kwargs)
    else:
        request = wrapped(**{**all_arguments(wrapped, args, kwargs), "lora_request": base_lora.request_for(spec)})
    if not checked:
        # A raw prompt, which the call itself has rendered.
        requests.check(spec, requests.Prompt.of_request(request), params, max_model_len)
    if spec is not None:
        requests.attach_prefix(request, spec, max_model_len)
    return request


def _lora_request_to_seq(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Loads what a call to `LLM` names by its path: once, and not again with each of its prompts or beams."""
    return runtime_loading.bound(wrapped(*args, **kwargs), instance.llm_engine.vllm_config)


def _new_request(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Hashes no blocks of a request before its prefix is in front of them, which is when they are hashed anyway."""
    sent = argument(wrapped, args, kwargs, "request")
    if not requests.has_prefix(sent):
        return wrapped(*args, **kwargs)
    request = wrapped(sent, None)
    request._block_hasher = argument(wrapped, args, kwargs, "block_hasher")
    return request


def _new_scheduler(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """Gives freed blocks back at once, as without a connector, so that a running engine can reset its prefix cache.

    Where steps overlap, vLLM holds them back: some connectors load into a block while a step still writes to it. Ours
    loads on the stream of the steps.
    """
    wrapped(*args, **kwargs)
    config = instance.vllm_config.kv_transfer_config
    if config is not None and config.kv_connector == CONNECTOR:
        instance.defer_block_free = False


def _register_add_request(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    index = wrapped(*args, **kwargs)
    logits_processors.show_real_prompt(instance, argument(wrapped, args, kwargs, "request"))
    return index


def _new_logprobs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    processor = wrapped(*args, **kwargs)
    prompt_logprobs.expect(processor, kwargs["request"] if "request" in kwargs else args[1])
    return processor


def _update_prompt_logprobs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(prompt_logprobs.real_rows(instance, kwargs["prompt_logprobs_tensors"] if kwargs else args[0]))


ENGINE_PATCHES = (
    MethodPatch(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("prompt", "params", "lora_request"),
        _process_inputs,
    ),
    MethodPatch(
        "vllm.entrypoints.common.offline",
        "OfflineInferenceMixin._lora_request_to_seq",
        ("lora_request",),
        _lora_request_to_seq,
    ),
    MethodPatch(
        "vllm.v1.engine.logprobs",
        "LogprobsProcessor.from_new_request",
        ("tokenizer", "request"),
        _new_logprobs,
    ),
    MethodPatch(
        "vllm.v1.engine.logprobs",
        "LogprobsProcessor._update_prompt_logprobs",
        ("prompt_logprobs_tensors",),
        _update_prompt_logprobs,
    ),
    # There is no hook before vLLM hashes a new request, which costs as much again as the rest of its way to the scheduler.
    MethodPatch(
        "vllm.v1.request",
        "Request.from_engine_core_request",
        ("request", "block_hasher"),
        _new_request,
    ),
    MethodPatch(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.__init__",
        ("vllm_config",),
        _new_scheduler,
    ),
    MethodPatch(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._handle_invalid_blocks",
        ("invalid_block_ids",),
        handle_invalid_blocks,
    ),
    MethodPatch(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch._register_add_request",
        ("request",),
        _register_add_request,
    ),
)
