"""Prefixes through vLLM's endpoints for LoRA adapters.

A prefix is recognized by its `adapter_config.json`, so what manages LoRA adapters (a controller, a script) manages prefixes as
well, without a change.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from vllm_plugin.adapters.adapter_kinds import holds_prefix, is_prefix_path
from vllm_plugin.front_end.serving_models import PrefixModels, refusal


async def load(
    request: Any, prefixes: PrefixModels | None, base_model_name: str | None = None
) -> ErrorResponse | str | None:
    """Loads what a request names as a LoRA adapter, if it is a prefix.

    Args:
        request: vLLM's `LoadLoRAAdapterRequest`.
        prefixes: The adapters of this server, if it serves prefixes.
        base_model_name: The served model that `/v1/models` lists as its parent.

    Returns:
        What vLLM's endpoint answers; None for a LoRA adapter, which is vLLM's.
    """
    name, path = request.lora_name, request.lora_path
    if prefixes is None:
        if not is_prefix_path(path):
            return None
        return refusal(
            f"The lora adapter {name!r} is a prefix, not a LoRA; start the server with --enable-prefix-adapters to load prefixes."
        )
    # In a thread: it may have to ask the Hub.
    if not path or not await asyncio.to_thread(holds_prefix, path):
        return refusal(f"The lora adapter {name!r} conflicts with a prefix adapter.") if prefixes.has(name) else None
    answer = await prefixes.load(name, path, base_model_name=base_model_name, replace=request.load_inplace)
    if isinstance(answer, ErrorResponse) and answer.error.code == HTTPStatus.CONFLICT:
        # What vLLM answers to a name that is taken, and what controllers expect.
        return refusal(answer.error.message)
    return answer
