"""A request with a prefix: which one it means, whether it can be answered correctly, and its way to the engine.

A client can only name an adapter. What reaches the engine is all there is to know of it, in the request's KV transfer
parameters, which a client may not set itself: the engine holds no table of adapters.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

from vllm import PoolingParams

from vllm_plugin.adapters import base_lora
from vllm_plugin.adapters.request import PrefixAdapterRequest
from vllm_plugin.adapters.runtime_loading import adapter_of
from vllm_plugin.adapters.spec import ADAPTERS, SALT_PREFIX, PrefixSpec, pack, settings_in
from vllm_plugin.errors import request_error_type, unavailable_error_type


class Prompt(NamedTuple):
    """What the checks need to know of a prompt that vLLM has rendered."""

    num_tokens: int | None
    cache_salt: str | None
    has_embeds: bool
    has_media: bool

    @classmethod
    def of_input(cls, prompt: Any) -> Prompt | None:
        """Reads an `EngineInput`; None for a prompt that is not rendered yet."""
        # As vLLM tells them apart.
        if not (isinstance(prompt, dict) and "type" in prompt):
            return None
        token_ids = prompt.get("prompt_token_ids")
        return cls(
            num_tokens=None if token_ids is None else len(token_ids),
            cache_salt=prompt.get("cache_salt"),
            has_embeds=prompt["type"] == "embeds",
            has_media=prompt["type"] == "multimodal",
        )

    @classmethod
    def of_request(cls, request: Any) -> Prompt:
        """Reads an `EngineCoreRequest`."""
        return cls(
            num_tokens=None if request.prompt_token_ids is None else len(request.prompt_token_ids),
            cache_salt=request.cache_salt,
            has_embeds=request.prompt_embeds is not None,
            has_media=bool(request.mm_features),
        )


def is_relevant(lora_request: Any, vllm_config: Any) -> bool:
    """Says whether a request needs any of this: an engine without prefixes serves it as vLLM does."""
    return isinstance(lora_request, PrefixAdapterRequest) or settings_in(vllm_config.kv_transfer_config) is not None


def adapter_named(lora_request: Any, vllm_config: Any) -> PrefixSpec | None:
    """Returns the prefix that a `lora_request` argument stands for; None for a LoRA or no adapter at all.

    Raises:
        PrefixRequestError: If it names a prefix that this engine does not have and cannot load.
    """
    if not isinstance(lora_request, PrefixAdapterRequest):
        return None
    return adapter_of(lora_request, vllm_config)


def check(spec: PrefixSpec | None, prompt: Prompt | None, params: Any, max_model_len: int) -> None:
    """Raises `PrefixRequestError` if a request cannot be answered correctly.

    Args:
        spec: Its prefix; None for a request to the base model, which may not pass for one with a prefix.
        prompt: Its prompt, if rendered.
        params: vLLM's `SamplingParams` or `PoolingParams`.
        max_model_len: The context, in tokens, virtual ones included.
    """
    error = request_error_type()
    transfer = (getattr(params, "extra_args", None) or {}).get("kv_transfer_params")
    # vLLM's scheduler reads it as a dict whatever it is, and would not survive anything else.
    if transfer is not None and not isinstance(transfer, Mapping):
        raise error(f"`kv_transfer_params` must be an object, got {transfer!r}.")
    if ADAPTERS in (transfer or {}):
        raise error(f"`kv_transfer_params` may not hold {ADAPTERS!r}; choose a prefix adapter with `model`.")
    if prompt is not None and prompt.cache_salt is not None and prompt.cache_salt.startswith(SALT_PREFIX):
        raise error(f"`cache_salt` may not start with {SALT_PREFIX!r}, which is kept for prefix adapters.")
    if spec is None:
        return
    adapter = f"the prefix adapter {spec.name!r}"
    if isinstance(params, PoolingParams):
        raise error(f"Embedding, scoring and other pooling requests cannot use {adapter}; use the base model.")
    if getattr(params, "prompt_logprob_token_ids", None) is not None:
        raise error(f"`prompt_logprob_token_ids` is not supported with {adapter}; use `prompt_logprobs`.")
    if prompt is None:
        return
    if prompt.has_embeds or prompt.num_tokens is None:
        raise error(f"`prompt_embeds` are not supported with {adapter}; send text or token ids.")
    if prompt.has_media:
        raise error(f"Images, audio and video are not supported with {adapter}; send text only.")
    if prompt.num_tokens == 0:
        raise error(f"The prompt is empty; {adapter} needs at least one token after it.")
    room = max_model_len - spec.num_virtual_tokens - prompt.num_tokens
    if room < 1:
        raise error(
            f"The prompt has {prompt.num_tokens} tokens, which with the {spec.num_virtual_tokens} virtual tokens of "
            f"{adapter} leave no room for an output token in a context of {max_model_len}; shorten the prompt to at "
            f"most {max_model_len - spec.num_virtual_tokens - 1} tokens."
        )
    if getattr(params, "min_tokens", 0) > room:
        raise error(
            f"`min_tokens` must be <= {room}, which is what the prompt and the {spec.num_virtual_tokens} virtual tokens "
            f"of {adapter} leave of the context, got {params.min_tokens}."
        )


def has_prefix(request: Any) -> bool:
    """Says whether an `EngineCoreRequest` is on its way with a prefix; see `route`."""
    extra_args = getattr(request.sampling_params, "extra_args", None)
    return extra_args is not None and ADAPTERS in (extra_args.get("kv_transfer_params") or ())


def attach_prefix(request: Any, spec: PrefixSpec, max_model_len: int) -> None:
    """Marks a checked `EngineCoreRequest` for its prefix and keeps its output inside the context.

    `max_tokens` is cut to what fits, as vLLM does for the base model, whose own cut does not know of virtual tokens.

    Raises:
        PrefixRequestError: If it is a streaming session.
    """
    if getattr(request, "resumable", False):
        raise request_error_type()(
            f"Streaming input is not supported with the prefix adapter {spec.name!r}; send the whole prompt at once."
        )
    # A copy that vLLM made for this request.
    params = request.sampling_params
    room = max_model_len - spec.num_virtual_tokens - len(request.prompt_token_ids)
    params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    extra_args = dict(params.extra_args or {})
    transfer = extra_args.get("kv_transfer_params") or {}
    extra_args["kv_transfer_params"] = {**transfer, ADAPTERS: pack(spec)}
    params.extra_args = extra_args


async def answers(outputs: AsyncGenerator[Any], spec: PrefixSpec) -> AsyncGenerator[Any]:
    """Passes on what an engine answers to a request with a prefix.

    Raises:
        PrefixUnavailableError: If the prefix could not be read, which vLLM would call an internal error.
    """
    # A client that hangs up closes this, and has to reach the request.
    async with aclosing(outputs):
        async for output in outputs:
            if any(each.finish_reason == "error" for each in output.outputs):
                raise unavailable_error_type()(
                    f"The prefix adapter {spec.name!r} could not be read into the cache, and the server's log says why; if its "
                    "files were written over, whoever runs the server has to load it again, by POST "
                    '/v1/load_prefix_adapter with "load_inplace": true.'
                )
            yield output


class CheckedRequest(PrefixAdapterRequest):
    """Of a call that need not be checked again."""


def check_call(named: Any, prompt: Any, params: Any, config: Any) -> tuple[PrefixSpec | None, bool]:
    """Returns the prefix of a call, if there is one, and whether its prompt was there to be checked, too.

    Args:
        named: Its `lora_request`.

    Raises:
        PrefixRequestError: If the call cannot be answered, as far as its arguments tell.
    """
    spec = adapter_named(named, config)
    rendered = Prompt.of_input(prompt)
    check(spec, rendered, params, config.model_config.max_model_len)
    base_lora.check(params, config)
    return spec, rendered is not None
