"""The layers of the model that drafts in speculative decoding, and the prefix that is written there.

They are in the KV cache beside the layers of the model itself, and use the block ids of the same requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index

from vllm_plugin.metadata import PrefixLoad
from vllm_plugin.worker.cache_layers import CacheLayer
from vllm_plugin.worker.state_layers import is_recurrent, specs_of


def draft_layer_names(vllm_config: Any, kv_cache_config: Any, modules: Mapping[str, Any]) -> frozenset[str]:
    """Returns the names of the layers that belong to the model that drafts; none without speculative decoding.

    vLLM creates them after the layers of the model itself, and gives them either other names or the numbers after those.
    Examples are `draft_model.model.layers.0` of a draft model, `mtp.layers.0` of Qwen3-Next, and `model.layers.32` of
    EAGLE on a model of 32 layers.

    Args:
        vllm_config: The engine's config.
        kv_cache_config: The engine's `KVCacheConfig`.
        modules: vLLM's attention modules by layer name, in the order in which they were created.
    """
    if vllm_config.speculative_config is None:
        return frozenset()
    cached = {name: spec for group in kv_cache_config.kv_cache_groups for name, spec in specs_of(group).items()}
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    stem = next((_stem(name) for name in modules if name in cached), "")
    return frozenset(
        name
        for name, spec in cached.items()
        # Falcon-H1's own mixers have the numbers after those of its layers as well.
        if _stem(name) != stem or (not is_recurrent(spec) and extract_layer_index(name) >= num_layers)
    )


def draft_loads(loads: Iterable[PrefixLoad]) -> list[PrefixLoad]:
    """Returns the loads of the draft model's prefixes that go with the loads of one step."""
    return [dataclasses.replace(load, spec=load.spec.draft) for load in loads if load.spec.draft is not None]


def share_memory(
    device_memory: int, layers: Sequence[CacheLayer], draft_layers: Sequence[CacheLayer]
) -> tuple[int, int]:
    """Divides the device memory for prefixes so that as many prefixes of both models fit.

    Returns:
        The bytes for prefixes of the model, and those for prefixes of the draft model.
    """
    sizes = [
        sum(layer.num_kv_heads * (layer.key_size + layer.value_size) for layer in part)
        for part in (layers, draft_layers)
    ]
    for_drafts = device_memory * sizes[1] // max(1, sum(sizes))
    return device_memory - for_drafts, for_drafts


def _stem(name: str) -> str:
    """Returns the part of a layer's name before its number."""
    parts = name.split(".")
    return ".".join(parts[: next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))])
