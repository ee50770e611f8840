"""The engine's recurrent layers, which keep one state per block of tokens in place of K/V."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import MambaSpec


@dataclass(frozen=True, slots=True)
class StateLayer:
    """One recurrent layer on this worker.

    Args:
        name: vLLM's name of the layer.
        index: Its index in the model.
        group: The KV cache group whose block ids it uses.
        block_size: Tokens per block of that group: a block holds the state after its last token.
    """

    name: str
    index: int
    group: int
    block_size: int


def is_recurrent(spec: Any) -> bool:
    """Returns whether a layer with this KV cache spec keeps states, and no K/V."""
    return isinstance(spec, MambaSpec)


def state_layers(kv_cache_config: Any) -> list[StateLayer]:
    """Returns the recurrent layers of a `KVCacheConfig`; none for most models."""
    return [
        StateLayer(name, extract_layer_index(name), group, entry.kv_cache_spec.block_size)
        for group, entry in enumerate(kv_cache_config.kv_cache_groups)
        for name, spec in specs_of(entry).items()
        if is_recurrent(spec)
    ]


def specs_of(group: Any) -> Mapping[str, Any]:
    """Returns the KV cache spec of each layer in a group, by name."""
    # A group whose layers differ in shape has one spec per layer.
    own = getattr(group.kv_cache_spec, "kv_cache_specs", {})
    return {name: own.get(name, group.kv_cache_spec) for name in group.layer_names}
