"""When the patches are attached: a few when vLLM imports what they wrap, all others once an engine serves prefixes.

vLLM loads the plugin into each of its processes. There `install` patches the parsing of the command line, the creation
of the engine's config, the methods that accept a LoRA adapter, which could be a prefix, and those of a worker that run
before it has a connector. It waits until vLLM imports them. All other patches wait for `require`, so vLLM without
prefixes runs unchanged. A patch that no longer fits this vLLM is left out, and `require` then raises a single error that
names all of them.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import wrapt

from vllm_plugin.errors import PrefixServeError
from vllm_plugin.front_end.cli_args import OPTIONS
from vllm_plugin.kv_transfer_config import CONNECTOR, CONNECTOR_MODULE, settings_in
from vllm_plugin.patches import patch
from vllm_plugin.patches.arguments import all_arguments
from vllm_plugin.patches.patch import MethodPatch
from vllm_plugin.patches.worker import WORKER_PATCHES

# First supported and first unsupported release.
MIN_VERSION, END_VERSION = (0, 30), (0, 34)
# Set to 1, this environment variable skips the check of vLLM's version; the methods are checked all the same.
ANY_VERSION = "PREFIX_SERVE_ANY_VLLM_VERSION"

_installed = False


class SharedFolder(str):
    """The registry's folder in the parsed options, which vLLM pickles for the other API server processes.

    Such a process reads the options before it loads plugins, so unpickling the folder installs this one.
    """

    def __reduce__(self) -> tuple[Callable[[str], SharedFolder], tuple[str]]:
        return restore_folder, (str(self),)


def restore_folder(folder: str) -> SharedFolder:
    """Unpickles a `SharedFolder`."""
    install()
    return SharedFolder(folder)


def install() -> None:
    """Attaches the start patches as soon as vLLM imports what they wrap. Calling it again has no effect."""
    global _installed
    if _installed:
        return
    _installed = True
    for start_patch in START_PATCHES:
        wrapt.register_post_import_hook(functools.partial(patch.attach, start_patch), start_patch.module)


def require(*, server: bool, kv_events: bool = False) -> None:
    """Makes this process ready for prefixes. Calling it again has no effect.

    Args:
        server: Whether to patch the OpenAI server as well, and not only the engine.
        kv_events: Whether the engine publishes KV events.

    Raises:
        PrefixServeError: If the plugin does not support this vLLM.
    """
    import vllm

    install()
    version = patch.vllm_version()
    is_known = MIN_VERSION <= version < END_VERSION or version == patch.DEVELOPMENT
    if not is_known and os.environ.get(ANY_VERSION) != "1":
        patch.problems["version"] = f"this release was written for 0.{MIN_VERSION[1]} to 0.{END_VERSION[1] - 1}"
    for method_patch in all_patches(server=server, kv_events=kv_events):
        if not method_patch.is_for(version):
            continue
        if method_patch.in_workers and method_patch.module not in sys.modules:
            # Attached by `install` when a worker imports it, and checked when the worker gets here.
            continue
        try:
            patch.attach(method_patch, importlib.import_module(method_patch.module))
        except ImportError as error:
            patch.problems[method_patch.method] = str(error)
    if patch.problems:
        raise PrefixServeError(
            f"Prefix adapters do not work with vLLM {vllm.__version__} ({'; '.join(patch.problems.values())}); install a "
            "supported version of vLLM or upgrade peft-prefix-ext."
        )
    _register_connector()


def all_patches(*, server: bool, kv_events: bool) -> tuple[MethodPatch, ...]:
    """Returns the patches of a process with prefixes; the wrappers import vLLM.

    Args:
        server: Whether to include those of the OpenAI server.
        kv_events: Whether to include those of KV events.
    """
    from vllm_plugin.patches.engine import ENGINE_PATCHES
    from vllm_plugin.patches.engine_core import ENGINE_CORE_PATCHES
    from vllm_plugin.patches.kv_events import KV_EVENT_PATCHES
    from vllm_plugin.patches.requests import REQUEST_PATCHES
    from vllm_plugin.patches.server import SERVER_PATCHES

    return (
        *START_PATCHES,
        *REQUEST_PATCHES,
        *ENGINE_PATCHES,
        *ENGINE_CORE_PATCHES,
        *(KV_EVENT_PATCHES if kv_events else ()),
        *(SERVER_PATCHES if server else ()),
    )


@functools.cache
def _register_connector() -> None:
    """Lets vLLM's `MultiConnector` find the class of our statistics, which it looks up by the connector's name."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)


def _add_cli_args(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from vllm_plugin.front_end.cli_args import add_argument

    parser = wrapped(*args, **kwargs)
    add_argument(parser)
    return parser


def _from_cli_args(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    engine_args = wrapped(*args, **kwargs)
    options = kwargs["args"] if "args" in kwargs else args[0]
    if getattr(options, "lora_modules", None):
        from vllm_plugin.front_end.lora_options import take_prefixes

        take_prefixes(options)
    if any(getattr(options, name, None) not in (None, False) for name in OPTIONS):
        from vllm_plugin.front_end import rust
        from vllm_plugin.front_end.engine_config import configure

        in_rust = rust.is_used(options)
        require(server=not in_rust)
        if in_rust:
            rust.check_options(options)
        engine_args.kv_transfer_config = configure(engine_args.kv_transfer_config, options)
        if in_rust:
            rust.hand_over(options)
        else:
            options.prefix_registry = SharedFolder(options.prefix_registry)
    return engine_args


def _create_engine_config(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if settings_in(instance.kv_transfer_config) is None:
        return wrapped(*args, **kwargs)
    from vllm_plugin.adapters.validation import publishes_events
    from vllm_plugin.front_end.engine_config import create

    require(server=False)
    vllm_config = create(instance, functools.partial(wrapped, *args, **kwargs))
    # Once more, since only the config says whether the engine publishes them.
    require(server=False, kv_events=publishes_events(vllm_config))
    return vllm_config


def _validate_lora(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Refuses a prefix that is given as a LoRA adapter, also in an engine without prefixes."""
    request = kwargs["lora_request"] if "lora_request" in kwargs else args[0]
    if request is not None:
        from vllm_plugin.adapters.adapter_kinds import check_lora

        check_lora(request)
    return wrapped(*args, **kwargs)


async def _load_lora_adapter(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Loads a prefix that is loaded as a LoRA adapter, and refuses a LoRA adapter with the name of a prefix."""
    from vllm_plugin.front_end import lora_endpoints

    arguments = all_arguments(wrapped, args, kwargs)
    answer = await lora_endpoints.load(
        arguments["request"], getattr(instance, "prefix_models", None), arguments.get("base_model_name")
    )
    return await wrapped(*args, **kwargs) if answer is None else answer


def _build_custom_logits_processors(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Shows real prompts to the logits processors of model runner V2, which exist before the connector does."""
    vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    if settings_in(vllm_config.kv_transfer_config) is None:
        return wrapped(*args, **kwargs)
    from vllm_plugin.worker.logits_processors_v2 import build

    return build(wrapped, *args, **kwargs)


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
    # The runner imports it from this package, which modules with processors may have imported before.
    MethodPatch(
        "vllm.v1.worker.gpu.sample.logits_processor",
        "build_custom_logits_processors",
        ("vllm_config", "req_states"),
        _build_custom_logits_processors,
        since=(0, 31),  # Before, model runner V2 had none.
    ),
    *WORKER_PATCHES,
)
