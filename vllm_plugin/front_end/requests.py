"""A request with a prefix: which adapter it names, whether it can be served correctly, and what the engine gets of it.

A client can only name an adapter. The front end looks it up and passes all that the engine needs in the request's KV
transfer parameters, which a client may not set itself. The engine holds no table of adapters.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

from vllm import PoolingParams, SamplingParams

from vllm_plugin.adapters import base_lora, handover
from vllm_plugin.adapters.request import PrefixAdapterRequest
from vllm_plugin.adapters.runtime_loading import adapter_of, as_prefix_request
from vllm_plugin.adapters.spec import SALT_PREFIX, PrefixSpec, pack
from vllm_plugin.kv_transfer_config import ADAPTERS, settings_in
from vllm_plugin.request_errors import PrefixRequestError, PrefixUnavailableError

# How vLLM calls prompt embeddings that stand among the text of a chat.
PROMPT_EMBEDS = "prompt_embeds"


class CheckedRequest(PrefixAdapterRequest):
    """Marks a call whose request and rendered prompt are checked already.

    Clients cannot forge it: they send names, and only the server's own code creates instances.
    """


class FixedRequest(PrefixAdapterRequest):
    """Marks a request that keeps its prefix whatever becomes of the files: all requests of a beam search have the same one."""


class Prompt(NamedTuple):
    """What the checks need to know of a rendered prompt."""

    num_tokens: int | None
    cache_salt: str | None
    has_embeds: bool
    has_media: bool

    @classmethod
    def of_input(cls, prompt: Any) -> Prompt | None:
        """Reads vLLM's `EngineInput`; returns None for a prompt that is not rendered yet."""
        # vLLM distinguishes them the same way.
        if not (isinstance(prompt, dict) and "type" in prompt):
            return None
        token_ids = prompt.get("prompt_token_ids")
        return cls(
            num_tokens=None if token_ids is None else len(token_ids),
            cache_salt=prompt.get("cache_salt"),
            has_embeds=prompt["type"] == "embeds" or PROMPT_EMBEDS in prompt.get("mm_placeholders", ()),
            has_media=prompt["type"] == "multimodal",
        )

    @classmethod
    def of_request(cls, request: Any) -> Prompt:
        """Reads vLLM's `EngineCoreRequest`."""
        return cls(
            num_tokens=None if request.prompt_token_ids is None else len(request.prompt_token_ids),
            cache_salt=request.cache_salt,
            has_embeds=request.prompt_embeds is not None
            or any(feature.modality == PROMPT_EMBEDS for feature in request.mm_features or ()),
            has_media=bool(request.mm_features),
        )


def is_plain(lora_request: Any, prompt: Any, params: Any) -> bool:
    """Returns whether a call names no adapter and has nothing else that is checked, as most calls of the base model."""
    return (
        lora_request is None
        and isinstance(params, SamplingParams)
        and not params.extra_args
        and params.prompt_logprobs is None
        and isinstance(prompt, dict)
        and not prompt.get("cache_salt")
    )


def is_relevant(lora_request: Any, vllm_config: Any) -> bool:
    """Returns whether the plugin has to look at a request: it names a prefix, or the engine serves prefixes."""
    return isinstance(lora_request, PrefixAdapterRequest) or settings_in(vllm_config.kv_transfer_config) is not None


def adapter_named(lora_request: Any, vllm_config: Any) -> PrefixSpec | None:
    """Returns the prefix that a `lora_request` argument names; None for a LoRA adapter or no adapter.

    Raises:
        PrefixRequestError: If this engine does not have the prefix and cannot load it.
    """
    if lora_request is None:
        return None
    if isinstance(lora_request, PrefixAdapterRequest) and lora_request.spec is not None:
        return lora_request.spec
    lora_request = as_prefix_request(lora_request, vllm_config)
    return adapter_of(lora_request, vllm_config) if isinstance(lora_request, PrefixAdapterRequest) else None


def check_call(lora_request: Any, prompt: Any, params: Any, vllm_config: Any) -> tuple[PrefixSpec | None, bool]:
    """Checks the arguments of a call before vLLM processes them.

    Returns:
        The prefix, if there is one, and whether the prompt is rendered and therefore checked as well.

    Raises:
        PrefixRequestError: If the arguments cannot be served.
    """
    spec = adapter_named(lora_request, vllm_config)
    rendered = Prompt.of_input(prompt)
    check(spec, rendered, params, vllm_config.model_config.max_model_len)
    base_lora.check(params, vllm_config)
    return spec, rendered is not None


def check(spec: PrefixSpec | None, prompt: Prompt | None, params: Any, max_model_len: int) -> None:
    """Raises `PrefixRequestError` if a request cannot be served correctly.

    Args:
        spec: Its prefix; None for a request to the base model, which must not pass for one with a prefix.
        prompt: Its prompt, if rendered.
        params: vLLM's `SamplingParams` or `PoolingParams`.
        max_model_len: The length of the context in tokens, virtual tokens included.
    """
    transfer = transfer_of(params)
    # vLLM's scheduler takes it for a dict without a check, and anything else would crash it.
    if transfer is not None and not isinstance(transfer, Mapping):
        raise PrefixRequestError(f"`kv_transfer_params` must be an object, got {transfer!r}.")
    if ADAPTERS in (transfer or {}):
        raise PrefixRequestError(
            f"`kv_transfer_params` may not hold {ADAPTERS!r}; choose a prefix adapter with `model`."
        )
    if transfer and (problem := handover.problem(spec, transfer)) is not None:
        raise PrefixRequestError(problem)
    if prompt is not None and prompt.cache_salt is not None and prompt.cache_salt.startswith(SALT_PREFIX):
        raise PrefixRequestError(
            f"`cache_salt` may not start with {SALT_PREFIX!r}, which is reserved for prefix adapters."
        )
    if spec is None:
        return
    if isinstance(params, PoolingParams):
        raise PrefixRequestError(
            f"Embedding, scoring and other pooling requests cannot use {_told(spec)}; use the base model."
        )
    if getattr(params, "prompt_logprob_token_ids", None) is not None:
        raise PrefixRequestError(
            f"`prompt_logprob_token_ids` is not supported with {_told(spec)}; use `prompt_logprobs`."
        )
    if prompt is None:
        return
    if prompt.has_embeds or prompt.num_tokens is None:
        raise PrefixRequestError(
            f"`prompt_embeds` are not supported with {_told(spec)}; send text, token ids or media."
        )
    if prompt.num_tokens == 0:
        raise PrefixRequestError(f"The prompt is empty; {_told(spec)} needs at least one token after it.")
    remaining = max_model_len - spec.num_virtual_tokens - prompt.num_tokens
    if remaining < 1:
        raise PrefixRequestError(
            f"The prompt has {prompt.num_tokens} tokens, {'media included, ' if prompt.has_media else ''}which with the "
            f"{spec.num_virtual_tokens} virtual tokens of {_told(spec)} leave no room for an output token in a context of "
            f"{max_model_len}; shorten the prompt to at most {max_model_len - spec.num_virtual_tokens - 1} tokens."
        )
    if getattr(params, "min_tokens", 0) > remaining:
        raise PrefixRequestError(
            f"`min_tokens` must be <= {remaining}, the part of the context that the prompt and the {spec.num_virtual_tokens} "
            f"virtual tokens of {_told(spec)} leave, got {params.min_tokens}."
        )


def _told(spec: PrefixSpec) -> str:
    return f"the prefix adapter {spec.name!r}"


def transfer_of(params: Any) -> Any:
    """Returns the KV transfer parameters of a request, as the client sent them; None if there are none."""
    return (getattr(params, "extra_args", None) or {}).get("kv_transfer_params")


def has_prefix(request: Any) -> bool:
    """Returns whether an `EngineCoreRequest` carries a prefix; see `attach_prefix`."""
    extra_args = getattr(request.sampling_params, "extra_args", None)
    return extra_args is not None and ADAPTERS in (extra_args.get("kv_transfer_params") or ())


def attach_prefix(request: Any, spec: PrefixSpec, max_model_len: int, num_engines: int) -> None:
    """Attaches a prefix to a checked `EngineCoreRequest`, and limits its output to the context.

    vLLM limits `max_tokens` to the context for the base model, but does not count virtual tokens.

    Args:
        request: The request.
        spec: The prefix.
        max_model_len: The length of the context in tokens, virtual tokens included.
        num_engines: How many data-parallel engines share the requests.

    Raises:
        PrefixRequestError: If it is a streaming session.
    """
    if getattr(request, "resumable", False):
        raise PrefixRequestError(
            f"Streaming input is not supported with the prefix adapter {spec.name!r}; send the whole prompt at once."
        )
    # Otherwise the blocks of all prefixes of this name would be the same.
    assert spec.digest, f"The prefix adapter {spec.name!r} was never read."
    # vLLM has made a copy for this request.
    params = request.sampling_params
    remaining = max_model_len - spec.num_virtual_tokens - len(request.prompt_token_ids)
    params.max_tokens = remaining if params.max_tokens is None else min(params.max_tokens, remaining)
    extra_args = dict(params.extra_args or {})
    transfer = extra_args.get("kv_transfer_params") or {}
    if num_engines > 1 and params.n > 1 and handover.is_handed_over(transfer):
        # The choices go to several engines, and only one may take over the blocks; see `scheduler/handovers.py`.
        transfer = {**transfer, "do_remote_prefill": False}
    extra_args["kv_transfer_params"] = {**transfer, ADAPTERS: pack(spec)}
    params.extra_args = extra_args


async def outputs_of(
    start: Callable[[PrefixSpec], AsyncGenerator[Any]],
    spec: PrefixSpec,
    look_again: Callable[[PrefixSpec], Awaitable[PrefixSpec | None]] | None = None,
    *,
    handed_over: bool = False,
) -> AsyncGenerator[Any]:
    """Yields the engine's outputs of a request with a prefix. It begins again if its files were written before they were read.

    Args:
        start: Begins the request with a prefix.
        spec: Its prefix.
        look_again: Returns what may take the place of a prefix that could not be read, which may be itself; None if nothing may.
        handed_over: Whether another server prefilled the request.

    Raises:
        PrefixUnavailableError: If the prefix, or what the other server prefilled, could not be loaded; vLLM would report
            an internal error.
    """
    current, may_begin_again = spec, look_again is not None
    while True:
        # A client that disconnects closes this generator, which has to close the engine's as well.
        async with aclosing(start(current)) as outputs:
            async for output in outputs:
                if any(completion.finish_reason == "error" for completion in output.outputs):
                    break
                # An answer is of one prefix.
                may_begin_again = False
                yield output
            else:
                return
        newer = await look_again(spec) if look_again is not None and may_begin_again else None
        # Once: files that change all the time are no reason to go on.
        may_begin_again = False
        if newer is None and handed_over:
            raise PrefixUnavailableError(
                f"What another server prefilled for this request with the prefix adapter {spec.name!r} could not be loaded, and "
                "the log of this server says why; send the request to both servers again."
            )
        if newer is None:
            raise PrefixUnavailableError(
                f"The prefix adapter {spec.name!r} could not be read into the cache, and the server's log says why; if its "
                "files were overwritten, the operator of the server has to load it again, by POST "
                '/v1/load_prefix_adapter with "load_inplace": true.'
            )
        current = newer
