"""The engine's recurrent layers, which keep one state per block of tokens in place of K/V."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import MambaSpec

from peft_prefix_ext.checkpoint.compatibility import StateShape
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.worker.state_layout import StateLayout, layout_of


@dataclass(frozen=True, slots=True)
class StateLayer:
    """One recurrent layer on this worker.

    Args:
        name: vLLM's name of the layer.
        index: Its index in the model.
        group: The KV cache group whose block ids it uses.
        block_size: Tokens per block of that group: a block holds the state after the last of them.
        shapes: The shapes of its cache tensors on this worker, without the dimension of the blocks.
        dtypes: Their dtypes.
        mixer: The class of vLLM's module.
        layout: How a trained state is written; None if the layer can only start from zero.
    """

    name: str
    index: int
    group: int
    block_size: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    mixer: str
    layout: StateLayout | None


def is_recurrent(spec: Any) -> bool:
    """Returns whether a layer with this KV cache spec keeps states, and no K/V."""
    return isinstance(spec, MambaSpec)


def state_layers(
    kv_cache_config: Any, modules: Mapping[str, Any], num_layers: int, leave_out: Container[str] = ()
) -> list[StateLayer]:
    """Returns the recurrent layers of a `KVCacheConfig`; none for most models.

    Args:
        kv_cache_config: vLLM's `KVCacheConfig`.
        modules: vLLM's modules by layer name.
        num_layers: Layers of the model.
        leave_out: Names of layers to leave out: those of a model that drafts.

    Raises:
        PrefixServeError: If the states of a layer cannot be written.
    """
    layers = []
    for group, entry in enumerate(kv_cache_config.kv_cache_groups):
        for name, spec in specs_of(entry).items():
            if name in leave_out or not is_recurrent(spec):
                continue
            module = modules.get(name)
            mixer = type(module).__name__
            if not isinstance(module, MambaBase):
                raise PrefixServeError(
                    f"The states of {name} ({mixer}) cannot be written from outside, so this model cannot be served with "
                    "prefix adapters."
                )
            layout = layout_of(module)
            if layout is not None and len(spec.shapes) != len(layout.shapes(0)):
                # A relative of the class that keeps more.
                layout = None
            layers.append(
                StateLayer(
                    name,
                    # Falcon-H1 has attention and a mixer in each layer, and vLLM numbers the mixers from `num_layers` on.
                    extract_layer_index(name) % num_layers,
                    group,
                    entry.kv_cache_spec.block_size,
                    tuple(map(tuple, spec.shapes)),
                    tuple(spec.dtypes),
                    mixer,
                    layout,
                )
            )
    return layers


def model_states(layers: Iterable[StateLayer]) -> tuple[StateShape, ...]:
    """Returns the shapes of the states of these layers in the whole model, in order of the index.

    A layer that can only start from zero has one row, whose kind is the class of vLLM's module.
    """
    return tuple(
        shape
        for layer in sorted(layers, key=lambda layer: layer.index)
        for shape in (
            layer.layout.shapes(layer.index) if layer.layout else [StateShape(layer.index, layer.mixer, 0, ())]
        )
    )


def specs_of(group: Any) -> Mapping[str, Any]:
    """Returns the KV cache spec of each layer in a group, by name."""
    # A group whose layers differ in shape has one spec per layer.
    own = getattr(group.kv_cache_spec, "kv_cache_specs", {})
    return {name: own.get(name, group.kv_cache_spec) for name in group.layer_names}
