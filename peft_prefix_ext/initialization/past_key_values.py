"""Initial K/V that the user gives (`init_kv`): a cache, a list of pairs or a dict of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.base_model.layers import ProbedLayer
from peft_prefix_ext.base_model.rope_deltas import has_rope_deltas
from peft_prefix_ext.base_model.states import ProbedState, states_of
from peft_prefix_ext.checkpoint.format import CROSS, DECODER, LayerKV, LayerState
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.initialization.key_rotation import KeyRotationError, shift


def kv_from_past_key_values(
    config: PrefixExtConfig, model: PreTrainedModel, layers: list[ProbedLayer]
) -> list[LayerKV]:
    """Returns the K/V of `init_kv` for each of `layers`, `[num_kv_heads, num_virtual_tokens, head_dim]` each.

    Text after a prefix of p virtual tokens starts at position p. If it would go on at `init_kv_next_position` instead, the
    keys are moved by the difference: attention goes by distances, which stay the same.

    Raises:
        ValueError: If a layer is missing, or its K/V have another shape or are not finite, or the position of the text is
            unknown or cannot be changed.
    """
    next_position = config.init_kv_next_position
    if next_position is None and has_rope_deltas(model):
        raise ValueError(
            f"{describe(model)} gives an image fewer positions than tokens, and `init_kv` does not tell: give "
            "`init_kv_next_position`, the position at which the text after it goes on (after text alone: "
            f"{config.num_virtual_tokens}, its number of tokens; after images, that plus the model's `rope_deltas`)."
        )
    initial = _given_kv(config, layers)
    if next_position is None or next_position == config.num_virtual_tokens:
        return initial
    by_index = {layer.index: kv for layer, kv in zip(layers, initial, strict=True)}
    try:
        shifted = shift(model, by_index, config.num_virtual_tokens - next_position)
    except KeyRotationError as error:
        raise ValueError(
            f"{error}, so `init_kv_next_position` must be {config.num_virtual_tokens}, the number of virtual tokens."
        ) from error
    return [shifted[layer.index] for layer in layers]


def _given_kv(config: PrefixExtConfig, layers: list[ProbedLayer]) -> list[LayerKV]:
    """Returns the K/V of `init_kv` as they are."""
    given = _by_index(config.init_kv, layers)
    if given.keys() != (expected := {layer.index for layer in layers}):
        raise ValueError(f"`init_kv` must have K/V for layers {sorted(expected)}, got {sorted(given)}.")
    initial = []
    for layer in layers:
        kv = []
        kinds = zip(LayerKV._fields, given[layer.index], layer.shapes(config.num_virtual_tokens), strict=True)
        for kind, tensor, shape in kinds:
            if not isinstance(tensor, torch.Tensor) or list(tensor.shape) not in (shape, [1, *shape]):
                found = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise ValueError(
                    f"`init_kv` must have a {kind} of shape {shape} (num_kv_heads, num_virtual_tokens, head_dim) for layer "
                    f"{layer.index}, got {found}."
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"`init_kv` holds NaN or Inf in the {kind} of layer {layer.index}.")
            kv.append(tensor.detach().view(shape).to(layer.kv.key.device, layer.kv.key.dtype))
        initial.append(LayerKV(*kv))
    return initial


def states_from_past_key_values(config: PrefixExtConfig, probed: list[ProbedState]) -> list[LayerState] | None:
    """Returns the states that the cache in `init_kv` holds for each recurrent layer; `None` if it holds none.

    Raises:
        ValueError: If they have other shapes or are not finite.
    """
    given = config.init_kv
    has_states = [
        isinstance(given, Cache)
        and each.index < len(given)
        and any(state is not None for state in getattr(given.layers[each.index], "conv_states", {}).values())
        for each in probed
    ]
    if not probed or not all(has_states):
        return None
    initial = []
    for each in probed:
        states = states_of(given.layers[each.index])
        if [tensor.shape for *_, tensor in states.numbered()] != [
            tensor.shape for *_, tensor in each.states.numbered()
        ]:
            raise ValueError(f"The cache in `init_kv` has states of other shapes than the model in layer {each.index}.")
        if not all(torch.isfinite(tensor).all() for *_, tensor in states.numbered()):
            raise ValueError(f"`init_kv` holds NaN or Inf in the states of layer {each.index}.")
        initial.append(
            LayerState(
                *(
                    tuple(ours.detach().to(like.device, like.dtype) for ours, like in zip(*kinds, strict=True))
                    for kinds in zip(states, each.states, strict=True)
                )
            )
        )
    return initial


def _by_index(given: Any, layers: list[ProbedLayer]) -> dict[int, tuple[Any, Any]]:
    """Returns the pairs of K and V by layer index."""
    if isinstance(given, EncoderDecoderCache):
        caches = {DECODER: given.self_attention_cache, CROSS: given.cross_attention_cache}
        first: dict[str, int] = {}  # the first index of each kind of attention
        pairs = {}
        for layer in layers:
            number = layer.index - first.setdefault(layer.attention, layer.index)
            if layer.attention in caches:
                pairs[layer.index] = _layer_of_cache(caches[layer.attention], number)
        return pairs
    if isinstance(given, Cache):
        return {layer.index: _layer_of_cache(given, layer.index) for layer in layers if layer.index < len(given)}
    if isinstance(given, Mapping):
        pairs = dict(given)
    elif isinstance(given, (list, tuple)):
        if len(given) != len(layers):
            raise ValueError(
                f"`init_kv` must have a pair of K and V for each of the {len(layers)} layers, got {len(given)}."
            )
        pairs = {layer.index: pair for layer, pair in zip(layers, given, strict=True)}
    else:
        raise ValueError(
            "`init_kv` must be a `Cache`, a list of pairs of K and V, or a dict of them by layer index, got "
            f"{type(given).__name__}."
        )
    for index, pair in pairs.items():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"`init_kv` must have a pair of K and V for layer {index}, got {type(pair).__name__}.")
    return pairs


def _layer_of_cache(cache: Cache, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    layer: Any = cache.layers[index]
    length = int(cache.get_seq_length(index))
    if layer.keys is None or layer.keys.shape[-2] < length:
        raise ValueError(
            f"The cache in `init_kv` does not hold all of its {length} tokens in layer {index}: prefill a `DynamicCache()` "
            "without the model's config, which keeps tokens outside of sliding windows, or use `init='tokens'`."
        )
    # A static cache has unused columns behind its tokens.
    return layer.keys[..., :length, :], layer.values[..., :length, :]
