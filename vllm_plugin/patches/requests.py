"""Patches on the path of a request into the engine, in processes that serve prefixes."""

from __future__ import annotations

from typing import Any

from vllm_plugin.adapters import base_lora, runtime_loading
from vllm_plugin.front_end import requests
from vllm_plugin.patches.arguments import argument, replaced
from vllm_plugin.patches.patch import MethodPatch


def _process_inputs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    config = instance.vllm_config
    lora_request = argument(wrapped, args, kwargs, "lora_request")
    prompt, params = argument(wrapped, args, kwargs, "prompt"), argument(wrapped, args, kwargs, "params")
    if requests.is_plain(lora_request, prompt, params) or not requests.is_relevant(lora_request, config):
        return wrapped(*args, **kwargs)
    max_model_len = config.model_config.max_model_len
    if isinstance(lora_request, requests.CheckedRequest):
        spec, checked = lora_request.spec, True
    else:
        spec, checked = requests.check_call(lora_request, prompt, params, config)
    if spec is not None:
        args, kwargs = replaced(wrapped, args, kwargs, "lora_request", base_lora.request_for(spec))
    request = wrapped(*args, **kwargs)
    if not checked:
        # The prompt was raw, and the call has rendered it.
        requests.check(spec, requests.Prompt.of_request(request), params, max_model_len)
    if spec is not None:
        requests.attach_prefix(request, spec, max_model_len, config.parallel_config.data_parallel_size)
    return request


def _lora_request_to_seq(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Loads the adapters that a call to `LLM` names by path once per call, and not once per prompt or beam."""
    return runtime_loading.load_requested(wrapped(*args, **kwargs), instance.llm_engine.vllm_config)


def _from_engine_core_request(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Defers the hashing of a request with a prefix until the placeholders precede its prompt, so it is hashed once."""
    sent = argument(wrapped, args, kwargs, "request")
    if not requests.has_prefix(sent):
        return wrapped(*args, **kwargs)
    request = wrapped(sent, None)
    request._block_hasher = argument(wrapped, args, kwargs, "block_hasher")
    return request


_TO_SEQ = "OfflineInferenceMixin._lora_request_to_seq"
REQUEST_PATCHES = (
    MethodPatch(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("prompt", "params", "lora_request"),
        _process_inputs,
    ),
    MethodPatch("vllm.entrypoints.common.offline", _TO_SEQ, ("lora_request",), _lora_request_to_seq, since=(0, 32)),
    MethodPatch("vllm.entrypoints.offline_utils", _TO_SEQ, ("lora_request",), _lora_request_to_seq, before=(0, 32)),
    # vLLM has no hook before it hashes a new request, and hashing twice would double the cost of adding it.
    MethodPatch(
        "vllm.v1.request",
        "Request.from_engine_core_request",
        ("request", "block_hasher"),
        _from_engine_core_request,
    ),
)
