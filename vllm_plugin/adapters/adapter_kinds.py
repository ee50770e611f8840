"""LoRA adapters and prefixes look alike on disk. A user who mixes them up is told where each belongs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft_prefix_ext.checkpoint.format import CONFIG_NAME, STOCK_TYPES
from vllm_plugin.errors import PrefixServeError

# The folder of a LoRA request is read once.
_known_paths: set[str] = set()


def holds_prefix(path: str | Path) -> bool:
    """Returns whether a local folder holds a prefix."""
    return _peft_type(path) in ("PREFIX_EXT", *STOCK_TYPES)


def holds_lora(path: str | Path) -> bool:
    """Returns whether a local folder holds a LoRA adapter."""
    return _peft_type(path) == "LORA"


def check_modules(modules: Any) -> None:
    """Raises `PrefixServeError` if one of `--lora-modules` is a prefix."""
    for module in modules or ():
        if holds_prefix(module.path):
            raise PrefixServeError(
                f"{module.path} holds a prefix, not a LoRA; give it as --prefix-adapter {module.name}={module.path} instead of "
                "--lora-modules."
            )


def check_lora(request: Any) -> None:
    """Raises `PrefixRequestError` if a `LoRARequest` names a prefix, which would crash vLLM's engine."""
    if not request.lora_path or request.lora_path in _known_paths:
        return
    if holds_prefix(request.lora_path):
        from vllm_plugin.request_errors import PrefixRequestError

        raise PrefixRequestError(
            f"{request.lora_path} holds a prefix, not a LoRA; start with `LLM(..., **prefix_adapters({{{request.lora_name!r}: "
            f"path}}))`, and pass `PrefixAdapterRequest({request.lora_name!r})` instead of a `LoRARequest`."
        )
    _known_paths.add(request.lora_path)


def _peft_type(path: str | Path) -> Any:
    try:
        config = json.loads((Path(path).expanduser() / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return None
    return config.get("peft_type") if isinstance(config, dict) else None
