"""Every place where the plugin wraps a method of vLLM's OpenAI server, in processes of a server that has prefixes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from vllm_plugin.adapters.request import PrefixAdapterRequest
from vllm_plugin.adapters.spec import PrefixSpec, settings_in
from vllm_plugin.front_end import requests
from vllm_plugin.patches.arguments import all_arguments, argument
from vllm_plugin.patches.install import MethodPatch


def _generate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Checks before the stream starts: once a response streams, its status can no longer be 400."""
    config = instance.vllm_config
    named = argument(wrapped, args, kwargs, "lora_request")
    if not requests.is_relevant(named, config):
        return wrapped(*args, **kwargs)
    params = argument(wrapped, args, kwargs, "sampling_params")
    spec, checked = requests.check_call(named, argument(wrapped, args, kwargs, "prompt"), params, config)
    if spec is None:
        return wrapped(*args, **kwargs)
    kind = requests.CheckedRequest if checked else PrefixAdapterRequest
    arguments = {**all_arguments(wrapped, args, kwargs), "lora_request": kind(lora_name=spec.name, spec=spec)}
    return requests.answers(wrapped(**arguments), spec)


def _beam_search(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Ends beams where the context ends: vLLM's own limit does not know of virtual tokens."""
    config = instance.engine_client.vllm_config
    arguments = all_arguments(wrapped, args, kwargs)
    spec = requests.adapter_named(arguments.get("lora_request"), config)
    prompt = requests.Prompt.of_input(arguments["prompt"])
    if spec is not None and prompt is not None and prompt.num_tokens is not None:
        params = arguments["params"] = copy.copy(arguments["params"])
        room = config.model_config.max_model_len - spec.num_virtual_tokens - prompt.num_tokens
        # At least one, so that a prompt which leaves no room is refused where others are.
        params.max_tokens = min(params.max_tokens, max(room, 1))
    return wrapped(**arguments)


async def _init_static_loras(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    await wrapped(*args, **kwargs)
    if settings_in(instance.engine_client.vllm_config.kv_transfer_config) is not None:
        from vllm_plugin.front_end.serving_models import PrefixModels

        prefixes = PrefixModels(instance)
        await prefixes.start()
        instance.prefix_models = prefixes


class TrustedPromptLimit(int):
    """How many tokens of a prompt fit behind a prefix; a client can send a number, and none of these."""


async def _check_model(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Lists prefixes among the models that there are.

    And truncates to the context where a client asks for that: vLLM's own limit does not know of virtual tokens.
    """
    request = kwargs["request"] if "request" in kwargs else args[0]
    prefixes = getattr(instance.models, "prefix_models", None)
    spec = _spec_of(instance.models, request.model)
    if spec is not None:
        # One is left for the output, as vLLM does.
        room = TrustedPromptLimit(instance.model_config.max_model_len - spec.num_virtual_tokens - 1)
        if getattr(request, "truncate_prompt_tokens", None) == -1:
            request.truncate_prompt_tokens = room
        elif hasattr(request, "truncation"):
            request.prefix_room = room
    refusal = await wrapped(*args, **kwargs)
    return refusal if refusal is None or prefixes is None else prefixes.with_names(refusal)


def _build_tok_params(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The same for `/v1/responses`, where clients have no number to set."""
    params = wrapped(*args, **kwargs)
    room = getattr(instance, "prefix_room", None)
    if isinstance(room, TrustedPromptLimit) and params.truncate_prompt_tokens == -1:
        return dataclasses.replace(params, truncate_prompt_tokens=room)
    return params


def _is_model_supported(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> bool:
    return wrapped(*args, **kwargs) or _spec_of(instance.models, *args, *kwargs.values()) is not None


def _maybe_get_adapters(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    request = kwargs["request"] if "request" in kwargs else args[0]
    prefixes = getattr(instance.models, "prefix_models", None)
    return (prefixes and prefixes.request(request.model)) or wrapped(*args, **kwargs)


def _spec_of(models: Any, name: str | None) -> PrefixSpec | None:
    prefixes = getattr(models, "prefix_models", None)
    return None if prefixes is None else prefixes.spec(name)


async def _show_available_models(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    models = await wrapped(*args, **kwargs)
    if (prefixes := getattr(instance, "prefix_models", None)) is not None:
        models.data.extend(prefixes.cards())
    return models


async def _startup(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """Says last what a server serves, and where."""
    await wrapped(*args, **kwargs)
    models = getattr(getattr(instance.config.app, "state", None), "openai_serving_models", None)
    prefixes = getattr(models, "prefix_models", None)
    if prefixes is not None and instance.started:
        sockets = argument(wrapped, args, kwargs, "sockets") or [
            each for one in instance.servers for each in one.sockets
        ]
        prefixes.announce(sockets[0].getsockname(), secure=instance.config.is_ssl)


def _attach_lora_router(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    wrapped(*args, **kwargs)
    from vllm_plugin.front_end.api_router import attach

    attach(kwargs["app"] if "app" in kwargs else args[0])


_MODELS, _SERVING = "vllm.entrypoints.openai.models.serving", "vllm.entrypoints.serve.engine.serving"
SERVER_PATCHES = (
    MethodPatch(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        ("prompt", "sampling_params", "lora_request"),
        _generate,
    ),
    MethodPatch(
        "vllm.entrypoints.generate.beam_search.online",
        "BeamSearchOnlineMixin.beam_search",
        ("prompt", "params", "lora_request"),
        _beam_search,
    ),
    MethodPatch(_MODELS, "OpenAIServingModels.init_static_loras", (), _init_static_loras),
    MethodPatch(_MODELS, "OpenAIServingModels.show_available_models", (), _show_available_models),
    MethodPatch(_SERVING, "BaseServing._check_model", ("request",), _check_model),
    # LoRA requests and prefixes are told apart by name here, and not by an entry of ours in vLLM's own table: that one is
    # searched from end to end for each chat request to the base model, and no other API server process sees it.
    MethodPatch(_SERVING, "BaseServing._is_model_supported", ("model_name",), _is_model_supported),
    MethodPatch(_SERVING, "BaseServing._maybe_get_adapters", ("request",), _maybe_get_adapters),
    MethodPatch(
        "vllm.entrypoints.openai.responses.protocol",
        "ResponsesRequest.build_tok_params",
        ("model_config",),
        _build_tok_params,
    ),
    MethodPatch("vllm.entrypoints.launchers.launcher", "NoSignalServer.startup", ("sockets",), _startup),
    # vLLM's hook for endpoints loads plugins that the operator lists in VLLM_PLUGINS, and then no others but those.
    MethodPatch("vllm.entrypoints.serve.lora.api_router", "attach_router", ("app",), _attach_lora_router),
)
