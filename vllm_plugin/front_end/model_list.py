"""The entries of `/v1/models` for prefixes, and the names in messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

from vllm_plugin.adapters.registry import Adapter


def make_cards(adapters: Iterable[Adapter], found: Iterable[str], models: Any) -> list[ModelCard]:
    """Returns an entry per adapter, in the form of those of LoRA modules.

    Args:
        adapters: The adapters in the table.
        found: Names of adapters that requests may use, and that no request has used yet.
        models: vLLM's `OpenAIServingModels`.
    """
    base = models.base_model_paths[0].name
    served = {each.name for each in models.base_model_paths}
    cards = [
        ModelCard(
            id=adapter.spec.name,
            root=adapter.spec.source,
            parent=adapter.base_model_name if adapter.base_model_name in served else base,
            permission=[ModelPermission()],
        )
        for adapter in adapters
    ]
    return cards + [ModelCard(id=name, parent=base, permission=[ModelPermission()]) for name in found]
