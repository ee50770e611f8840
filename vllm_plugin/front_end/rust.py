"""The command line of a server with vLLM's Rust front end, a program of its own that this plugin is not part of.

It is started with the parsed options, and loads every LoRA module into the engine. So it gets prefixes as LoRA modules, and
the engine finds out what they are (`engine_adapters.py`).
"""

from __future__ import annotations

from argparse import Namespace

from vllm_plugin.errors import PrefixServeError
from vllm_plugin.front_end.cli_args import OPTIONS

# It asks the engine for no adapter that it does not know, and sends no requests of its own.
UNSUPPORTED = ("prefix_adapter_dir", "prefix_adapter_hub", "prefix_adapter_warmup")


def is_used(options: Namespace) -> bool:
    """Returns whether these options are those of a server with the Rust front end."""
    from vllm import envs

    # Other commands, and engines without a front end of their own, run in Python whatever the variable says.
    is_server = getattr(options, "subparser", None) == "serve" and not getattr(options, "headless", False)
    return is_server and bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False))


def check_options(options: Namespace) -> None:
    """Raises `PrefixServeError` if an option needs Python's front end."""
    for name in UNSUPPORTED:
        # Without a name, --prefix-adapter-warmup stands for all.
        if getattr(options, name, None) is not None:
            raise PrefixServeError(
                f"--{name.replace('_', '-')} needs vLLM's Python front end; unset VLLM_USE_RUST_FRONTEND, or leave it out."
            )


def hand_over(options: Namespace) -> None:
    """Makes LoRA modules of the prefixes among the parsed options, and removes all that vLLM's own program does not know."""
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    prefixes = [
        LoRAModulePath(adapter.name, adapter.path, adapter.base_model_name) for adapter in options.prefix_adapter or ()
    ]
    options.lora_modules = [*(options.lora_modules or ()), *prefixes] or None
    for name in OPTIONS:
        setattr(options, name, False if name == "enable_prefix_adapters" else None)
    # The engine's config names it as well.
    del options.prefix_registry
