"""What vLLM has for LoRA adapters and a prefix may be given to: `--lora-modules`, and variables of the environment."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping

from vllm_plugin.adapters.adapter_kinds import holds_prefix
from vllm_plugin.adapters.options import AdapterOption, check_name

# A client can load and unload adapters if one of these is set. vLLM's own does not allow several API server processes. Ours
# does not start with VLLM_: vLLM warns of such variables, or refuses to start, if they are not its own.
SWITCH, VLLM_SWITCH = "PREFIX_SERVE_ALLOW_RUNTIME_UPDATING", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
RESOLVER_FOLDER, RESOLVER_REPOSITORIES = "VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_LORA_RESOLVER_HF_REPO_LIST"


def switches_on() -> list[str]:
    """Returns which of the variables are set that let clients load and unload adapters."""
    return [name for name in (SWITCH, VLLM_SWITCH) if os.environ.get(name, "0").strip().lower() in ("1", "true")]


def take_prefixes(options: Namespace) -> None:
    """Moves the prefixes among the `--lora-modules` of the parsed options to those of `--prefix-adapter`.

    Raises:
        PrefixServeError: If one has a name that no prefix can have.
    """
    modules = list(getattr(options, "lora_modules", None) or ())
    prefixes = [module for module in modules if holds_prefix(module.path)]
    if not prefixes:
        return
    for module in prefixes:
        check_name(module.name)
    options.lora_modules = [module for module in modules if module not in prefixes] or None
    options.prefix_adapter = [
        *(getattr(options, "prefix_adapter", None) or ()),
        *(AdapterOption(module.name, module.path, module.base_model_name) for module in prefixes),
    ]


def resolver_folders(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the folder of vLLM's resolver of LoRA adapters, if it is on. It may hold prefixes as well."""
    folder = environment.get(RESOLVER_FOLDER)
    return [folder] if folder and _resolves(environment) else []


def resolver_repositories(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the repositories of vLLM's resolver for the Hub, if it is on."""
    plugins = environment.get("VLLM_PLUGINS", "").split(",")
    on = _resolves(environment) and "lora_hf_hub_resolver" in plugins
    return [name for name in environment.get(RESOLVER_REPOSITORIES, "").split(",") if name] if on else []


def _resolves(environment: Mapping[str, str]) -> bool:
    return environment.get(VLLM_SWITCH, "0").strip().lower() in ("1", "true")
