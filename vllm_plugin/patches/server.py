"""Patches of vLLM's OpenAI server, in processes of a server with prefixes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from vllm_plugin.adapters import handover
from vllm_plugin.adapters.request import PrefixAdapterRequest
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.front_end import requests
from vllm_plugin.kv_transfer_config import settings_in
from vllm_plugin.patches.arguments import all_arguments, argument, replaced
from vllm_plugin.patches.patch import MethodPatch


class TrustedPromptLimit(int):
    """How many prompt tokens fit behind a prefix.

    Clients cannot forge it: what they send is parsed into plain numbers, and only this module creates instances.
    """


class TrustedTemplate(str):
    """The chat template of the messages behind a prefix, which the operator's adapter brings. Clients cannot forge it either."""


def _generate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Checks the request before the stream starts: once a response streams, its status can no longer be 400."""
    config = instance.vllm_config
    lora_request = argument(wrapped, args, kwargs, "lora_request")
    prompt, params = argument(wrapped, args, kwargs, "prompt"), argument(wrapped, args, kwargs, "sampling_params")
    if requests.is_plain(lora_request, prompt, params) or not requests.is_relevant(lora_request, config):
        return wrapped(*args, **kwargs)
    named, checked = requests.check_call(lora_request, prompt, params, config)
    if named is None:
        return wrapped(*args, **kwargs)
    request_type = requests.CheckedRequest if checked else PrefixAdapterRequest

    def start(spec: PrefixSpec) -> Any:
        if spec is not named:
            requests.check(spec, requests.Prompt.of_input(prompt), params, config.model_config.max_model_len)
        request = request_type(lora_name=spec.name, spec=spec)
        new_args, new_kwargs = replaced(wrapped, args, kwargs, "lora_request", request)
        return wrapped(*new_args, **new_kwargs)

    prefixes: Any = getattr(instance, "prefix_models", None)
    # The blocks of another server are of the prefix that it used.
    handed_over = handover.is_handed_over(requests.transfer_of(params) or {})
    is_fixed = prefixes is None or handed_over or isinstance(lora_request, requests.FixedRequest)
    return requests.outputs_of(start, named, None if is_fixed else prefixes.look_again, handed_over=handed_over)


def _beam_search(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Ends beams at the end of the context, as vLLM's own limit does not count virtual tokens, and keeps to one prefix."""
    config = instance.engine_client.vllm_config
    arguments = all_arguments(wrapped, args, kwargs)
    spec = requests.adapter_named(arguments.get("lora_request"), config)
    prompt = requests.Prompt.of_input(arguments["prompt"])
    if spec is not None:
        arguments["lora_request"] = requests.FixedRequest(lora_name=spec.name, spec=spec)
    if spec is not None and prompt is not None and prompt.num_tokens is not None:
        params = arguments["params"] = copy.copy(arguments["params"])
        remaining = config.model_config.max_model_len - spec.num_virtual_tokens - prompt.num_tokens
        # At least one, so that a prompt which is too long is refused by the check of all requests.
        params.max_tokens = min(params.max_tokens, max(remaining, 1))
    return wrapped(**arguments)


async def _init_static_loras(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    await wrapped(*args, **kwargs)
    if settings_in(instance.engine_client.vllm_config.kv_transfer_config) is not None:
        from vllm_plugin.front_end.serving_models import PrefixModels

        prefixes = PrefixModels(instance)
        await prefixes.start()
        instance.prefix_models = instance.engine_client.prefix_models = prefixes


def _check_model(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Looks for prefixes only where the base model is not named: that has no coroutine of its own to wait for."""
    request = kwargs["request"] if "request" in kwargs else args[0]
    prefixes = getattr(instance.models, "prefix_models", None)
    if prefixes is None or request.model in prefixes.base_names:
        return wrapped(*args, **kwargs)
    return _check_prefix(wrapped, instance, args, kwargs, request, prefixes)


async def _check_prefix(wrapped: Any, instance: Any, args: Any, kwargs: Any, request: Any, prefixes: Any) -> Any:
    """Finds the prefix that a request names, and adds the prefixes to the message that lists the available models.

    It also truncates the prompt to the context if the client asks for it, since vLLM's own limit does not count virtual
    tokens, and notes the chat template of a prefix that stands for the opening of a chat.
    """
    adapter = await prefixes.resolve(request.model)
    if isinstance(adapter, ErrorResponse):
        return adapter
    if adapter is not None:
        # One token is left for the output, as in vLLM.
        limit = TrustedPromptLimit(instance.model_config.max_model_len - adapter.spec.num_virtual_tokens - 1)
        if getattr(request, "truncate_prompt_tokens", None) == -1:
            request.truncate_prompt_tokens = limit
        elif hasattr(request, "truncation"):
            request.prefix_prompt_limit = limit
        if adapter.chat_template is not None and hasattr(request, "build_chat_params"):
            request.prefix_chat_template = TrustedTemplate(adapter.chat_template)
    refusal = await wrapped(*args, **kwargs)
    return refusal if refusal is None else prefixes.with_names(refusal)


def _build_tok_params(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Truncates prompts of `/v1/responses`, where clients ask for truncation without a number."""
    params = wrapped(*args, **kwargs)
    limit = getattr(instance, "prefix_prompt_limit", None)
    if isinstance(limit, TrustedPromptLimit) and params.truncate_prompt_tokens == -1:
        return dataclasses.replace(params, truncate_prompt_tokens=limit)
    return params


def _build_chat_params(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Renders the messages behind the opening of a chat, which the prefix stands for, without it."""
    template = getattr(instance, "prefix_chat_template", None)
    if not isinstance(template, TrustedTemplate):
        return wrapped(*args, **kwargs)
    return wrapped(**{**all_arguments(wrapped, args, kwargs), "default_template": str(template)})


def _is_model_supported(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> bool:
    return wrapped(*args, **kwargs) or _spec_of(instance.models, *args, *kwargs.values()) is not None


def _maybe_get_adapters(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    request = kwargs["request"] if "request" in kwargs else args[0]
    prefixes = getattr(instance.models, "prefix_models", None)
    return (prefixes and prefixes.request(request.model)) or wrapped(*args, **kwargs)


def _spec_of(models: Any, name: str | None) -> PrefixSpec | None:
    prefixes = getattr(models, "prefix_models", None)
    return None if prefixes is None else prefixes.spec(name)


async def _unload_lora_adapter(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Unloads a prefix through vLLM's endpoint for LoRA adapters as well."""
    request = kwargs["request"] if "request" in kwargs else args[0]
    prefixes = getattr(instance, "prefix_models", None)
    if prefixes is not None and request.lora_name not in instance.lora_requests and prefixes.has(request.lora_name):
        return prefixes.unload(request.lora_name)
    return await wrapped(*args, **kwargs)


async def _startup(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """Logs, once the server is up, what it serves and where."""
    await wrapped(*args, **kwargs)
    models = getattr(getattr(instance.config.app, "state", None), "openai_serving_models", None)
    prefixes = getattr(models, "prefix_models", None)
    if prefixes is not None and instance.started:
        sockets = argument(wrapped, args, kwargs, "sockets") or [
            socket for server in instance.servers for socket in server.sockets
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
    MethodPatch(_MODELS, "OpenAIServingModels.unload_lora_adapter", ("request",), _unload_lora_adapter),
    MethodPatch(_SERVING, "BaseServing._check_model", ("request",), _check_model),
    # Prefixes are looked up here by name, and not through entries in vLLM's own table of LoRA adapters: vLLM searches
    # that table from end to end for each chat request to the base model, and API server processes do not share it.
    MethodPatch(_SERVING, "BaseServing._is_model_supported", ("model_name",), _is_model_supported),
    MethodPatch(_SERVING, "BaseServing._maybe_get_adapters", ("request",), _maybe_get_adapters),
    MethodPatch(
        "vllm.entrypoints.openai.responses.protocol",
        "ResponsesRequest.build_tok_params",
        ("model_config",),
        _build_tok_params,
    ),
    *(
        MethodPatch(module, f"{request}.build_chat_params", ("default_template",), _build_chat_params)
        for module, request in (
            ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
            ("vllm.entrypoints.openai.responses.protocol", "ResponsesRequest"),
            ("vllm.entrypoints.serve.tokenize.protocol", "TokenizeChatRequest"),
        )
    ),
    # Before, it was uvicorn's own.
    MethodPatch("vllm.entrypoints.launchers.launcher", "NoSignalServer.startup", ("sockets",), _startup, since=(0, 32)),
    # vLLM's hook for endpoints loads only plugins that VLLM_PLUGINS lists, and then no others.
    MethodPatch("vllm.entrypoints.serve.lora.api_router", "attach_router", ("app",), _attach_lora_router),
)
