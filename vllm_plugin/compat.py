"""Every place where the plugin wraps a method of vLLM, and the check that each is still what it was written for.

A wrap is put on when vLLM imports the module, so nothing is imported early. One that no longer fits is left out and
remembered: vLLM without prefix adapters goes on as before, and asking for one raises a single clear error (`require`).
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import wrapt

from vllm_plugin.cli import OPTIONS
from vllm_plugin.config import settings_in
from vllm_plugin.errors import PrefixServeError

# First and first unsupported release: what was read for this plugin.
MIN_VERSION, END_VERSION = (0, 32), (0, 34)

_problems: dict[str, str] = {}
_installed = False


@dataclass(frozen=True, slots=True)
class Seam:
    """One wrapped method.

    Args:
        module: vLLM's module.
        method: `Class.method` in it.
        parameters: Parameters that must be there by these names.
        wrapper: What runs instead, as `wrapt` calls it.
        server: Whether only a server needs it.
    """

    module: str
    method: str
    parameters: tuple[str, ...]
    wrapper: Callable[..., Any]
    server: bool = False

    def problem(self, module: ModuleType) -> str | None:
        """Says how the method differs from what the wrapper expects, or None."""
        target: Any = module
        for part in self.method.split("."):
            target = getattr(target, part, None)
        if not callable(target):
            return f"{self.module} has no {self.method}"
        missing = [name for name in self.parameters if name not in inspect.signature(target).parameters]
        return f"{self.method} has no parameter {', '.join(missing)}" if missing else None


def install() -> None:
    """Registers every wrap; calling it again changes nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    for seam in SEAMS:
        wrapt.register_post_import_hook(functools.partial(_attach, seam), seam.module)


def require(*, server: bool) -> None:
    """Raises `PrefixServeError` if this vLLM is not one the plugin works with.

    Args:
        server: Whether the OpenAI server's seams are needed too, or only the engine's.
    """
    import vllm
    from vllm import envs

    install()
    is_development_build = "dev" in vllm.__version__
    # On such a build the shapes alone decide.
    version = MIN_VERSION if is_development_build else tuple(int(part) for part in vllm.__version__.split(".")[:2])
    if not MIN_VERSION <= version < END_VERSION:
        _problems["version"] = "this release was written for 0.32 and 0.33"
    for seam in SEAMS:
        if server or not seam.server:
            try:
                importlib.import_module(seam.module)
            except ImportError as error:
                _problems[seam.method] = str(error)
    if _problems:
        raise PrefixServeError(
            f"Prefix adapters do not work with vLLM {vllm.__version__} ({'; '.join(_problems.values())}); install a "
            "supported version of vLLM or upgrade peft-prefix-ext."
        )
    if server and getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        raise PrefixServeError("Prefix adapters need vLLM's Python front end; unset VLLM_USE_RUST_FRONTEND.")


def _attach(seam: Seam, module: ModuleType) -> None:
    if problem := seam.problem(module):
        _problems[seam.method] = problem
    else:
        wrapt.wrap_function_wrapper(module, seam.method, seam.wrapper)


def _add_cli_args(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from vllm_plugin.cli import add_argument

    parser = wrapped(*args, **kwargs)
    add_argument(parser)
    return parser


def _from_cli_args(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    engine_args = wrapped(*args, **kwargs)
    options = kwargs["args"] if "args" in kwargs else args[0]
    if any(getattr(options, name, None) for name in OPTIONS):
        from vllm_plugin.startup import configure

        engine_args.kv_transfer_config = configure(engine_args.kv_transfer_config, options)
    return engine_args


def _create_engine_config(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if settings_in(instance.kv_transfer_config) is None:
        return wrapped(*args, **kwargs)
    from vllm_plugin.startup import create

    return create(instance, functools.partial(wrapped, *args, **kwargs))


def _process_inputs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    config = instance.vllm_config
    if _is_idle(config, args, kwargs):
        return wrapped(*args, **kwargs)
    from vllm_plugin import serving

    arguments = _arguments(wrapped, args, kwargs)
    if not serving.concerns(arguments.get("lora_request"), config):
        return wrapped(*args, **kwargs)
    spec = serving.adapter_named(arguments.get("lora_request"), config)
    params, max_model_len = arguments["params"], instance.model_config.max_model_len
    serving.check(spec, serving.Prompt.of_input(arguments["prompt"]), params, max_model_len)
    if spec is not None:
        arguments["lora_request"] = None
    request = wrapped(**arguments)
    # Again on the result: a raw prompt is rendered by the call itself.
    serving.check(spec, serving.Prompt.of_request(request), params, max_model_len)
    if spec is not None:
        serving.route(request, spec, max_model_len)
    return request


def _generate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Checks before the stream starts: once a response streams, its status can no longer be 400."""
    config = instance.vllm_config
    if _is_idle(config, args, kwargs):
        return wrapped(*args, **kwargs)
    from vllm_plugin import serving

    arguments = _arguments(wrapped, args, kwargs)
    if not serving.concerns(arguments.get("lora_request"), config):
        return wrapped(*args, **kwargs)
    spec = serving.adapter_named(arguments.get("lora_request"), config)
    prompt = serving.Prompt.of_input(arguments["prompt"])
    serving.check(spec, prompt, arguments["sampling_params"], config.model_config.max_model_len)
    return wrapped(*args, **kwargs)


def _beam_search(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Ends beams where the context ends: vLLM's own limit does not know of virtual tokens."""
    config = instance.engine_client.vllm_config
    if _is_idle(config, args, kwargs):
        return wrapped(*args, **kwargs)
    from vllm_plugin import serving

    arguments = _arguments(wrapped, args, kwargs)
    spec = serving.adapter_named(arguments.get("lora_request"), config)
    prompt = serving.Prompt.of_input(arguments["prompt"])
    if spec is not None and prompt is not None and prompt.num_tokens is not None:
        params = arguments["params"] = copy.copy(arguments["params"])
        room = config.model_config.max_model_len - spec.num_virtual_tokens - prompt.num_tokens
        # At least one, so that a prompt which leaves no room is refused where others are.
        params.max_tokens = min(params.max_tokens, max(room, 1))
    return wrapped(**arguments)


def _is_idle(vllm_config: Any, args: Any, kwargs: Any) -> bool:
    """Says at a glance that a call is none of ours, which is all that most servers ever pay for this plugin."""
    return vllm_config.kv_transfer_config is None and kwargs.get("lora_request") is None and len(args) <= 3


def _arguments(wrapped: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns the arguments of a call to a bound method, by name."""
    names = _parameters(getattr(wrapped, "__func__", wrapped))[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


@functools.cache
def _parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _new_logprobs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from vllm_plugin.prompt_logprobs import expect

    processor = wrapped(*args, **kwargs)
    expect(processor, kwargs["request"] if "request" in kwargs else args[1])
    return processor


def _update_prompt_logprobs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from vllm_plugin.prompt_logprobs import real_rows

    return wrapped(real_rows(instance, kwargs["prompt_logprobs_tensors"] if kwargs else args[0]))


async def _init_static_loras(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    await wrapped(*args, **kwargs)
    if settings_in(instance.engine_client.vllm_config.kv_transfer_config) is not None:
        from vllm_plugin.models import PrefixModels

        prefixes = PrefixModels(instance)
        await prefixes.start()
        instance.prefix_models = prefixes


def _is_model_supported(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> bool:
    return wrapped(*args, **kwargs) or _request_for(instance.models, *args, *kwargs.values()) is not None


def _maybe_get_adapters(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    request = kwargs["request"] if "request" in kwargs else args[0]
    return _request_for(instance.models, request.model) or wrapped(*args, **kwargs)


def _request_for(models: Any, name: str | None) -> Any:
    prefixes = getattr(models, "prefix_models", None)
    return None if prefixes is None else prefixes.request(name)


async def _show_available_models(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    models = await wrapped(*args, **kwargs)
    if (prefixes := getattr(instance, "prefix_models", None)) is not None:
        models.data.extend(prefixes.cards())
    return models


async def _load_lora_adapter(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """A LoRA that comes at run time may not take the name of a prefix; vLLM itself finds none of ours to unload."""
    request = kwargs["request"] if "request" in kwargs else args[0]
    prefixes = getattr(instance, "prefix_models", None)
    refusal = None if prefixes is None else prefixes.refuse_lora(request.lora_name)
    return refusal or await wrapped(*args, **kwargs)


def _attach_lora_router(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    wrapped(*args, **kwargs)
    from vllm_plugin.endpoints import attach

    attach(kwargs["app"] if "app" in kwargs else args[0])


_ARGS = "vllm.engine.arg_utils"
_MODELS, _SERVING = "vllm.entrypoints.openai.models.serving", "vllm.entrypoints.serve.engine.serving"
SEAMS = (
    Seam(_ARGS, "EngineArgs.add_cli_args", ("parser",), _add_cli_args),
    Seam(_ARGS, "EngineArgs.from_cli_args", ("args",), _from_cli_args),
    Seam(_ARGS, "EngineArgs.create_engine_config", (), _create_engine_config),
    Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("prompt", "params", "lora_request"),
        _process_inputs,
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
    Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        ("prompt", "sampling_params", "lora_request"),
        _generate,
        server=True,
    ),
    Seam(
        "vllm.entrypoints.generate.beam_search.online",
        "BeamSearchOnlineMixin.beam_search",
        ("prompt", "params", "lora_request"),
        _beam_search,
        server=True,
    ),
    Seam(_MODELS, "OpenAIServingModels.init_static_loras", (), _init_static_loras, server=True),
    Seam(_MODELS, "OpenAIServingModels.show_available_models", (), _show_available_models, server=True),
    Seam(_MODELS, "OpenAIServingModels.load_lora_adapter", ("request",), _load_lora_adapter, server=True),
    # LoRA requests and prefixes are told apart by name here, and not by an entry of ours in vLLM's own table: that one is
    # searched from end to end for each chat request to the base model, and no other API server process sees it.
    Seam(_SERVING, "BaseServing._is_model_supported", ("model_name",), _is_model_supported, server=True),
    Seam(_SERVING, "BaseServing._maybe_get_adapters", ("request",), _maybe_get_adapters, server=True),
    # vLLM's hook for endpoints loads plugins that the operator lists in VLLM_PLUGINS, and then no others but those.
    Seam("vllm.entrypoints.serve.lora.api_router", "attach_router", ("app",), _attach_lora_router, server=True),
)
