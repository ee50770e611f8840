"""Patches of vLLM's engine, for front ends that this plugin is not part of."""

from __future__ import annotations

import sys
from typing import Any

from vllm_plugin.front_end.engine_adapters import adapters_of
from vllm_plugin.kv_transfer_config import settings_in
from vllm_plugin.logger import logger
from vllm_plugin.patches.arguments import argument
from vllm_plugin.patches.patch import MethodPatch
from vllm_plugin.request_errors import PrefixRequestError


def _serves_prefixes(engine: Any) -> bool:
    return settings_in(engine.vllm_config.kv_transfer_config) is not None


def _preprocess_add_request(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Finds the prefix of a request and checks the request. vLLM answers an error here, and its engine goes on."""
    if _serves_prefixes(instance):
        request = kwargs["request"] if "request" in kwargs else args[0]
        try:
            adapters_of(instance).prepare(request)
        except PrefixRequestError:
            if instance.mm_receiver_cache is not None and request.mm_features:
                # The front end will not send these media again.
                instance.mm_receiver_cache.get_and_update_features(request.mm_features)
            raise
    return wrapped(*args, **kwargs)


def _add_lora(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Loads what turns out to be a prefix, while the engine goes on."""
    loaded = (
        adapters_of(instance).load(argument(wrapped, args, kwargs, "lora_request"))
        if _serves_prefixes(instance)
        else None
    )
    if loaded is None:
        return wrapped(*args, **kwargs)
    # An engine in a process of its own waits for futures. Otherwise the caller does.
    return loaded if hasattr(instance, "output_queue") else loaded.result()


def _remove_lora(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if _serves_prefixes(instance) and adapters_of(instance).unload(argument(wrapped, args, kwargs, "lora_id")):
        return True
    return wrapped(*args, **kwargs)


def _make_ready_response(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Tells front ends that adapters may be loaded, which vLLM says of LoRA adapters only. Each request may have one."""
    response = wrapped(*args, **kwargs)
    if _serves_prefixes(instance):
        response.supports_lora = True
        response.max_loras = max(response.max_loras, response.max_num_seqs)
    return response


def _handle_request_preproc_error(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """Logs a refusal in a line. From 0.33 on vLLM does, and the client gets the reason with HTTP 400."""
    error = sys.exception()
    if not isinstance(error, PrefixRequestError):
        wrapped(*args, **kwargs)
        return
    request = kwargs["request"] if "request" in kwargs else args[0]
    logger.info("Request %s failed validation: %s", request.request_id, error)
    instance._send_error_outputs_to_client([request.request_id], request.client_index)


_CORE = "vllm.v1.engine.core"
ENGINE_CORE_PATCHES = (
    MethodPatch(_CORE, "EngineCore.preprocess_add_request", ("request",), _preprocess_add_request),
    MethodPatch(_CORE, "EngineCore.add_lora", ("lora_request",), _add_lora),
    MethodPatch(_CORE, "EngineCore.remove_lora", ("lora_id",), _remove_lora),
    MethodPatch(_CORE, "EngineCoreProc._make_ready_response", (), _make_ready_response),
    MethodPatch(
        _CORE,
        "EngineCoreProc._handle_request_preproc_error",
        ("request",),
        _handle_request_preproc_error,
        before=(0, 33),
    ),
)
