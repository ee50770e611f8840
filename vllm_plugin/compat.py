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

from vllm_plugin.errors import PrefixServeError

# First and first unsupported release: what was read for this plugin. Below, `on_new_request` is missing.
MIN_VERSION, END_VERSION = (0, 26), (0, 34)

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
        _problems["version"] = "this release was written for 0.26 to 0.33"
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
    from vllm_plugin.cli import as_mapping
    from vllm_plugin.config import merge

    engine_args = wrapped(*args, **kwargs)
    namespace = kwargs["args"] if "args" in kwargs else args[0]
    if pairs := getattr(namespace, "prefix_adapter", None):
        require(server=True)
        engine_args.kv_transfer_config = merge(engine_args.kv_transfer_config, as_mapping(pairs))
    return engine_args


def _create_engine_config(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from vllm_plugin import store
    from vllm_plugin.config import adapters_in

    sources = adapters_in(instance.kv_transfer_config)
    if not sources:
        return wrapped(*args, **kwargs)
    require(server=False)
    if getattr(instance, "kv_offloading_size", None) is not None:
        raise PrefixServeError(
            "--kv-offloading-size replaces the KV connector of the prefix adapters; name the OffloadingConnector in "
            "--kv-transfer-config instead."
        )
    served = instance.served_model_name or [instance.model]
    store.check_served_names(sources, [served] if isinstance(served, str) else served)
    instance.kv_transfer_config, checkpoints = store.open_adapters(instance.kv_transfer_config)
    vllm_config = wrapped(*args, **kwargs)
    store.check_engine(vllm_config)
    for name, checkpoint in checkpoints.items():
        store.check_adapter(name, checkpoint, vllm_config)
    return vllm_config


def _process_inputs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from vllm_plugin import serving

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    if not serving.concerns(call.arguments.get("lora_request"), instance.vllm_config):
        return wrapped(*args, **kwargs)
    spec = serving.adapter_named(call.arguments.get("lora_request"), instance.vllm_config)
    params, max_model_len = call.arguments["params"], instance.model_config.max_model_len
    serving.check(spec, serving.Prompt.of_input(call.arguments["prompt"]), params, max_model_len)
    if spec is not None:
        call.arguments["lora_request"] = None
    request = wrapped(*call.args, **call.kwargs)
    # Again on the result: a raw prompt is rendered by the call itself.
    serving.check(spec, serving.Prompt.of_request(request), params, max_model_len)
    if spec is not None:
        serving.route(request, spec, max_model_len)
    return request


def _generate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Checks before the stream starts: once a response streams, its status can no longer be 400."""
    from vllm_plugin import serving

    arguments = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    config = instance.vllm_config
    if not serving.concerns(arguments.get("lora_request"), config):
        return wrapped(*args, **kwargs)
    spec = serving.adapter_named(arguments.get("lora_request"), config)
    prompt = serving.Prompt.of_input(arguments["prompt"])
    serving.check(spec, prompt, arguments["sampling_params"], config.model_config.max_model_len)
    return wrapped(*args, **kwargs)


def _beam_search(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Ends beams where the context ends: vLLM's own limit does not know of virtual tokens."""
    from vllm_plugin import serving

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    config = instance.engine_client.vllm_config
    spec = serving.adapter_named(call.arguments.get("lora_request"), config)
    prompt = serving.Prompt.of_input(call.arguments["prompt"])
    if spec is not None and prompt is not None and prompt.num_tokens is not None:
        params = call.arguments["params"] = copy.copy(call.arguments["params"])
        room = config.model_config.max_model_len - spec.num_virtual_tokens - prompt.num_tokens
        # At least one, so that a prompt which leaves no room is refused where others are.
        params.max_tokens = min(params.max_tokens, max(room, 1))
    return wrapped(*call.args, **call.kwargs)


def _new_logprobs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from vllm_plugin.prompt_logprobs import expect

    processor = wrapped(*args, **kwargs)
    expect(processor, kwargs["request"] if "request" in kwargs else args[1])
    return processor


def _update_prompt_logprobs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from vllm_plugin.prompt_logprobs import real_rows

    return wrapped(real_rows(instance, kwargs["prompt_logprobs_tensors"] if kwargs else args[0]))


async def _init_static_loras(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    from vllm_plugin.serving import publish

    await wrapped(*args, **kwargs)
    publish(instance, instance.engine_client.vllm_config)


_ARGS = "vllm.engine.arg_utils"
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
    Seam(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.init_static_loras",
        (),
        _init_static_loras,
        server=True,
    ),
)
