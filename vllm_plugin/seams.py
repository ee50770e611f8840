"""Every place where the plugin wraps a method of vLLM for requests and models, in processes that have prefixes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from typing import Any

from vllm_plugin import loading, logits, lora, prompt_logprobs, serving
from vllm_plugin.compat import Seam
from vllm_plugin.config import CONNECTOR, PrefixSpec, settings_in
from vllm_plugin.failures import handle_invalid_blocks
from vllm_plugin.request import PrefixAdapterRequest


def _process_inputs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    config = instance.vllm_config
    named = _argument(wrapped, args, kwargs, "lora_request")
    if not serving.concerns(named, config):
        return wrapped(*args, **kwargs)
    params, max_model_len = _argument(wrapped, args, kwargs, "params"), config.model_config.max_model_len
    if isinstance(named, _CheckedRequest):
        spec, checked = named.spec, True
    else:
        spec, checked = _check(named, _argument(wrapped, args, kwargs, "prompt"), params, config)
    if spec is None:
        request = wrapped(*args, **kwargs)
    else:
        request = wrapped(**{**_arguments(wrapped, args, kwargs), "lora_request": lora.request_for(spec)})
    if not checked:
        # A raw prompt, which the call itself has rendered.
        serving.check(spec, serving.Prompt.of_request(request), params, max_model_len)
    if spec is not None:
        serving.route(request, spec, max_model_len)
    return request


def _generate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Checks before the stream starts: once a response streams, its status can no longer be 400."""
    config = instance.vllm_config
    named = _argument(wrapped, args, kwargs, "lora_request")
    if not serving.concerns(named, config):
        return wrapped(*args, **kwargs)
    params = _argument(wrapped, args, kwargs, "sampling_params")
    spec, checked = _check(named, _argument(wrapped, args, kwargs, "prompt"), params, config)
    if spec is None:
        return wrapped(*args, **kwargs)
    kind = _CheckedRequest if checked else PrefixAdapterRequest
    arguments = {**_arguments(wrapped, args, kwargs), "lora_request": kind(lora_name=spec.name, spec=spec)}
    return serving.answers(wrapped(**arguments), spec)


class _CheckedRequest(PrefixAdapterRequest):
    """Of a call that need not be checked again."""


def _check(named: Any, prompt: Any, params: Any, config: Any) -> tuple[PrefixSpec | None, bool]:
    """Returns the prefix of a call, if there is one, and whether its prompt was there to be checked, too.

    Args:
        named: Its `lora_request`.

    Raises:
        PrefixRequestError: If the call cannot be answered, as far as its arguments tell.
    """
    spec = serving.adapter_named(named, config)
    rendered = serving.Prompt.of_input(prompt)
    serving.check(spec, rendered, params, config.model_config.max_model_len)
    lora.check(params, config)
    return spec, rendered is not None


def _lora_request_to_seq(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Loads what a call to `LLM` names by its path: once, and not again with each of its prompts or beams."""
    return loading.bound(wrapped(*args, **kwargs), instance.llm_engine.vllm_config)


def _beam_search(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Ends beams where the context ends: vLLM's own limit does not know of virtual tokens."""
    config = instance.engine_client.vllm_config
    arguments = _arguments(wrapped, args, kwargs)
    spec = serving.adapter_named(arguments.get("lora_request"), config)
    prompt = serving.Prompt.of_input(arguments["prompt"])
    if spec is not None and prompt is not None and prompt.num_tokens is not None:
        params = arguments["params"] = copy.copy(arguments["params"])
        room = config.model_config.max_model_len - spec.num_virtual_tokens - prompt.num_tokens
        # At least one, so that a prompt which leaves no room is refused where others are.
        params.max_tokens = min(params.max_tokens, max(room, 1))
    return wrapped(**arguments)


def _arguments(wrapped: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns the arguments of a call to a bound method, by name."""
    return {**dict(zip(_places(getattr(wrapped, "__func__", wrapped)), args, strict=False)), **kwargs}


def _argument(wrapped: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Returns one of them, or None: each request comes by, and most go on as they came."""
    if name in kwargs:
        return kwargs[name]
    place = _places(getattr(wrapped, "__func__", wrapped))[name]
    return args[place] if place < len(args) else None


@functools.cache
def _places(function: Any) -> dict[str, int]:
    names = list(inspect.signature(function).parameters)[1:]
    return {name: place for place, name in enumerate(names)}


def _new_request(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Hashes no blocks of a request before its prefix is in front of them, which is when they are hashed anyway."""
    sent = _argument(wrapped, args, kwargs, "request")
    if not serving.has_prefix(sent):
        return wrapped(*args, **kwargs)
    request = wrapped(sent, None)
    request._block_hasher = _argument(wrapped, args, kwargs, "block_hasher")
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
    logits.show_real_prompt(instance, _argument(wrapped, args, kwargs, "request"))
    return index


def _new_logprobs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    processor = wrapped(*args, **kwargs)
    prompt_logprobs.expect(processor, kwargs["request"] if "request" in kwargs else args[1])
    return processor


def _update_prompt_logprobs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(prompt_logprobs.real_rows(instance, kwargs["prompt_logprobs_tensors"] if kwargs else args[0]))


async def _init_static_loras(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    await wrapped(*args, **kwargs)
    if settings_in(instance.engine_client.vllm_config.kv_transfer_config) is not None:
        from vllm_plugin.models import PrefixModels

        prefixes = PrefixModels(instance)
        await prefixes.start()
        instance.prefix_models = prefixes


class _Room(int):
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
        room = _Room(instance.model_config.max_model_len - spec.num_virtual_tokens - 1)
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
    if isinstance(room, _Room) and params.truncate_prompt_tokens == -1:
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
        sockets = _argument(wrapped, args, kwargs, "sockets") or [
            each for one in instance.servers for each in one.sockets
        ]
        prefixes.announce(sockets[0].getsockname(), secure=instance.config.is_ssl)


def _attach_lora_router(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    wrapped(*args, **kwargs)
    from vllm_plugin.endpoints import attach

    attach(kwargs["app"] if "app" in kwargs else args[0])


_MODELS, _SERVING = "vllm.entrypoints.openai.models.serving", "vllm.entrypoints.serve.engine.serving"
ENGINE_SEAMS = (
    Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("prompt", "params", "lora_request"),
        _process_inputs,
    ),
    Seam(
        "vllm.entrypoints.common.offline",
        "OfflineInferenceMixin._lora_request_to_seq",
        ("lora_request",),
        _lora_request_to_seq,
    ),
    Seam(
        "vllm.v1.engine.logprobs",
        "LogprobsProcessor.from_new_request",
        ("tokenizer", "request"),
        _new_logprobs,
    ),
    Seam(
        "vllm.v1.engine.logprobs",
        "LogprobsProcessor._update_prompt_logprobs",
        ("prompt_logprobs_tensors",),
        _update_prompt_logprobs,
    ),
    # There is no hook before vLLM hashes a new request, which costs as much again as the rest of its way to the scheduler.
    Seam(
        "vllm.v1.request",
        "Request.from_engine_core_request",
        ("request", "block_hasher"),
        _new_request,
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.__init__",
        ("vllm_config",),
        _new_scheduler,
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._handle_invalid_blocks",
        ("invalid_block_ids",),
        handle_invalid_blocks,
    ),
    Seam(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch._register_add_request",
        ("request",),
        _register_add_request,
    ),
)
SERVER_SEAMS = (
    Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        ("prompt", "sampling_params", "lora_request"),
        _generate,
    ),
    Seam(
        "vllm.entrypoints.generate.beam_search.online",
        "BeamSearchOnlineMixin.beam_search",
        ("prompt", "params", "lora_request"),
        _beam_search,
    ),
    Seam(_MODELS, "OpenAIServingModels.init_static_loras", (), _init_static_loras),
    Seam(_MODELS, "OpenAIServingModels.show_available_models", (), _show_available_models),
    Seam(_SERVING, "BaseServing._check_model", ("request",), _check_model),
    # LoRA requests and prefixes are told apart by name here, and not by an entry of ours in vLLM's own table: that one is
    # searched from end to end for each chat request to the base model, and no other API server process sees it.
    Seam(_SERVING, "BaseServing._is_model_supported", ("model_name",), _is_model_supported),
    Seam(_SERVING, "BaseServing._maybe_get_adapters", ("request",), _maybe_get_adapters),
    Seam(
        "vllm.entrypoints.openai.responses.protocol",
        "ResponsesRequest.build_tok_params",
        ("model_config",),
        _build_tok_params,
    ),
    Seam("vllm.entrypoints.launchers.launcher", "NoSignalServer.startup", ("sockets",), _startup),
    # vLLM's hook for endpoints loads plugins that the operator lists in VLLM_PLUGINS, and then no others but those.
    Seam("vllm.entrypoints.serve.lora.api_router", "attach_router", ("app",), _attach_lora_router),
)
