"""The engine's attention layers, and the part of a prefix that each worker holds."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from peft_prefix_ext.checkpoint.compatibility import LayerShape
from peft_prefix_ext.checkpoint.format import LayerKV
from vllm_plugin.adapters.cache_layout import AS_TRANSFORMERS, CacheLayout
from vllm_plugin.adapters.registry import Shapes
from vllm_plugin.adapters.validation import check_shapes
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.worker.state_layers import is_recurrent, specs_of


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """One attention layer with a KV cache of its own, on this worker.

    Args:
        name: vLLM's name of the layer.
        index: Its index in the model.
        group: The KV cache group whose block ids it uses.
        block_size: Tokens per block of that group.
        num_kv_heads: KV heads on this worker.
        key_size: Width of a key head, or of a latent.
        value_size: Width of a value head, or of the rotated part of a latent layer's keys.
        layout: How vLLM caches it.
    """

    name: str
    index: int
    group: int
    block_size: int
    num_kv_heads: int
    key_size: int
    value_size: int
    layout: CacheLayout = AS_TRANSFORMERS


@dataclass(frozen=True, slots=True)
class LayerStack:
    """Layers of one KV cache group and one shape, which are written together.

    Args:
        group: Their KV cache group.
        block_size: Tokens per block of that group.
        layers: The layers, at least one.
    """

    group: int
    block_size: int
    layers: tuple[CacheLayer, ...]


def stacks_of(layers: Iterable[CacheLayer]) -> list[LayerStack]:
    """Groups layers into as few stacks as possible."""
    stacks: dict[tuple[int, ...], list[CacheLayer]] = {}
    for layer in layers:
        shape = (layer.group, layer.block_size, layer.num_kv_heads, layer.key_size, layer.value_size)
        stacks.setdefault(shape, []).append(layer)
    return [LayerStack(group, block_size, tuple(alike)) for (group, block_size, *_), alike in stacks.items()]


def cache_layers(
    kv_cache_config: Any, layout: CacheLayout = AS_TRANSFORMERS, leave_out: Container[str] = ()
) -> list[CacheLayer]:
    """Returns the layers of a `KVCacheConfig` that have a KV cache of their own; `state_layers` returns the others.

    Args:
        kv_cache_config: The engine's `KVCacheConfig`.
        layout: How vLLM caches the layers of this model.
        leave_out: Names of layers to leave out; those of one model remain.

    Raises:
        PrefixServeError: If one of them is not an attention layer of that layout.
    """
    if layout.kv_lora_rank is None:
        supported: tuple[type, ...] = (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)
    else:
        supported = (MLAAttentionSpec,)
    layers: dict[int, CacheLayer] = {}
    for group, entry in enumerate(kv_cache_config.kv_cache_groups):
        for name, spec in specs_of(entry).items():
            if name in leave_out or is_recurrent(spec):
                continue
            if type(spec) not in supported:
                raise PrefixServeError(
                    f"Prefix adapters support attention layers that are full, sliding-window, chunked or latent; {name} has "
                    f"a cache of type {type(spec).__name__}."
                )
            key_size, value_size = _sizes(spec, layout)
            layer = CacheLayer(
                name=name,
                index=extract_layer_index(name, layout.attentions_per_layer),
                group=group,
                block_size=entry.kv_cache_spec.block_size,
                num_kv_heads=spec.num_kv_heads,
                key_size=key_size,
                value_size=value_size,
                layout=layout,
            )
            if layer.index in layers:
                raise PrefixServeError(
                    f"Prefix adapters support one KV cache per layer; {layers[layer.index].name} and {name} share one "
                    "layer number."
                )
            layers[layer.index] = layer
    return list(layers.values())


def _sizes(spec: Any, layout: CacheLayout) -> tuple[int, int]:
    """Returns the widths of a layer's keys and values."""
    if layout.kv_lora_rank is not None:
        # One row of the cache holds both.
        return layout.kv_lora_rank, spec.head_size - layout.kv_lora_rank
    return spec.head_size, getattr(spec, "head_size_v", None) or spec.head_size


def model_shapes(layers: Iterable[CacheLayer], tp_size: int, total_num_kv_heads: int) -> Shapes:
    """Returns the shapes of these layers in the whole model, sorted by index.

    Args:
        layers: The layers of this worker.
        tp_size: Number of tensor-parallel ranks.
        total_num_kv_heads: KV heads per layer of the model. With more ranks than heads, several ranks hold the same
            head.
    """
    replicas = max(1, tp_size // total_num_kv_heads)
    return tuple(
        (layer.index, layer.num_kv_heads * tp_size // replicas, layer.key_size, layer.value_size)
        for layer in sorted(layers, key=lambda layer: layer.index)
    )


def shard(name: str, kv: LayerKV, layer: CacheLayer, tp_rank: int, tp_size: int) -> LayerKV:
    """Returns the KV heads of this tensor-parallel rank, as vLLM caches them.

    vLLM assigns consecutive heads to each rank or, with more ranks than heads, the same head to consecutive ranks. So
    every rank has a latent, which is one head.

    Returns:
        Keys and values, `[num_virtual_tokens, num_kv_heads, head_dim]` each.

    Raises:
        PrefixServeError: If the shapes do not fit the layer.
    """
    total = kv.key.shape[0]
    shape = LayerShape(layer.index, total, kv.key.shape[2], kv.value.shape[2])
    check_shapes(name, [shape], model_shapes([layer], tp_size, total))
    first = tp_rank // max(1, tp_size // total) * layer.num_kv_heads
    own = LayerKV(*(tensor[first : first + layer.num_kv_heads] for tensor in kv))
    return LayerKV(*(_token_major(tensor) for tensor in layer.layout.apply(own)))


def _token_major(heads: torch.Tensor) -> torch.Tensor:
    return heads.transpose(0, 1).contiguous()
