"""How the plugin is attached to vLLM: as little as possible, and checked against what it was written for.

A plugin is loaded into every process of every vLLM. There it wraps what reads the command line and makes an engine's
config, and what takes a LoRA, which could be a prefix, when vLLM imports that, so that nothing is imported early. All other wraps (`seams.py`) wait until an engine is to
have prefixes (`require`): vLLM without them goes on as before. A wrap that no longer fits is left out and remembered,
and asking for prefixes raises a single clear error.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import wrapt

from vllm_plugin.adapters.spec import CONNECTOR, CONNECTOR_MODULE, settings_in
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.front_end.cli_args import OPTIONS

# First and first unsupported release: what was read for this plugin.
MIN_VERSION, END_VERSION = (0, 32), (0, 34)
# Lets what the seams look like decide alone, for who knows what they do.
ANY_VERSION = "PREFIX_SERVE_ANY_VLLM_VERSION"

_problems: dict[str, str] = {}
_attached: set[str] = set()
_installed = False


@dataclass(frozen=True, slots=True)
class MethodPatch:
    """One wrapped method.

    Args:
        module: vLLM's module.
        method: `Class.method` in it.
        parameters: Parameters that must be there by these names.
        wrapper: What runs instead, as `wrapt` calls it.
    """

    module: str
    method: str
    parameters: tuple[str, ...]
    wrapper: Callable[..., Any]

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
    """Sees to it that vLLM knows our options; calling it again changes nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    for seam in START_PATCHES:
        wrapt.register_post_import_hook(functools.partial(attach, seam), seam.module)


def require(*, server: bool) -> None:
    """Makes this process ready for prefixes; calling it again changes nothing.

    Args:
        server: Whether for the OpenAI server, too, or only for an engine.

    Raises:
        PrefixServeError: If this vLLM is not one the plugin works with.
    """
    import vllm
    from vllm import envs

    from vllm_plugin.patches.requests import ENGINE_PATCHES, SERVER_PATCHES

    install()
    # On a development build the shapes alone decide, too.
    shapes_decide = "dev" in vllm.__version__ or os.environ.get(ANY_VERSION) == "1"
    version = MIN_VERSION if shapes_decide else tuple(int(part) for part in vllm.__version__.split(".")[:2])
    if not MIN_VERSION <= version < END_VERSION:
        _problems["version"] = "this release was written for 0.32 and 0.33"
    for seam in (*START_PATCHES, *ENGINE_PATCHES, *(SERVER_PATCHES if server else ())):
        try:
            attach(seam, importlib.import_module(seam.module))
        except ImportError as error:
            _problems[seam.method] = str(error)
    if _problems:
        raise PrefixServeError(
            f"Prefix adapters do not work with vLLM {vllm.__version__} ({'; '.join(_problems.values())}); install a "
            "supported version of vLLM or upgrade peft-prefix-ext."
        )
    if server and getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        raise PrefixServeError("Prefix adapters need vLLM's Python front end; unset VLLM_USE_RUST_FRONTEND.")
    _register_connector()


@functools.cache
def _register_connector() -> None:
    """Lets vLLM's `MultiConnector` find the class of our statistics: it asks for it by the connector's name alone."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)


def attach(seam: MethodPatch, module: ModuleType) -> None:
    """Puts on a wrap, once; one that does not fit is left out and remembered."""
    if seam.method in _attached:
        return
    if problem := seam.problem(module):
        _problems[seam.method] = problem
    else:
        wrapt.wrap_function_wrapper(module, seam.method, seam.wrapper)
        _attached.add(seam.method)


def _add_cli_args(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from vllm_plugin.front_end.cli_args import add_argument

    parser = wrapped(*args, **kwargs)
    add_argument(parser)
    return parser


def _from_cli_args(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    engine_args = wrapped(*args, **kwargs)
    options = kwargs["args"] if "args" in kwargs else args[0]
    if getattr(options, "lora_modules", None):
        from vllm_plugin.adapters.adapter_kinds import check_modules

        check_modules(options.lora_modules)
    if any(getattr(options, name, None) for name in OPTIONS):
        from vllm_plugin.front_end.engine_config import configure

        engine_args.kv_transfer_config = configure(engine_args.kv_transfer_config, options)
    return engine_args


def _create_engine_config(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if settings_in(instance.kv_transfer_config) is None:
        return wrapped(*args, **kwargs)
    from vllm_plugin.front_end.engine_config import create

    return create(instance, functools.partial(wrapped, *args, **kwargs))


def _validate_lora(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Refuses a prefix that is given as a LoRA, in an engine without prefixes, too."""
    request = kwargs["lora_request"] if "lora_request" in kwargs else args[0]
    if request is not None:
        from vllm_plugin.adapters.adapter_kinds import check_lora

        check_lora(request)
    return wrapped(*args, **kwargs)


async def _load_lora_adapter(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The same for one that comes at run time, which may not take the name of a prefix either."""
    from vllm_plugin.front_end.serving_models import refuse_lora

    request = kwargs["request"] if "request" in kwargs else args[0]
    return refuse_lora(request, getattr(instance, "prefix_models", None)) or await wrapped(*args, **kwargs)


_ARGS = "vllm.engine.arg_utils"
START_PATCHES = (
    MethodPatch(_ARGS, "EngineArgs.add_cli_args", ("parser",), _add_cli_args),
    MethodPatch(_ARGS, "EngineArgs.from_cli_args", ("args",), _from_cli_args),
    MethodPatch(_ARGS, "EngineArgs.create_engine_config", (), _create_engine_config),
    MethodPatch("vllm.v1.engine.input_processor", "InputProcessor._validate_lora", ("lora_request",), _validate_lora),
    MethodPatch(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.load_lora_adapter",
        ("request",),
        _load_lora_adapter,
    ),
)
