"""Prefixes of encoder-decoder models (T5, BART and related ones).

The encoder and the decoder have a decoder hook each, and there are three kinds of attention: the prefix stands before
the decoder's tokens in its self-attention, before the encoder's tokens in the encoder's self-attention, and before the
encoder's output in cross-attention (Li & Liang 2021 use all three in BART). In both stacks real tokens start at position
p. These models take no `position_ids`: BART embeds positions that it counts itself, T5 adds a bias by distance to the
attention scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache

from peft_prefix_ext.checkpoint.format import CROSS, DECODER, ENCODER, LayerKV
from peft_prefix_ext.injection.cache_view import PrefixCacheView, prepend
from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook
from peft_prefix_ext.injection.forward_context import PrefixForwardContext
from peft_prefix_ext.injection.layer import PrefixExtLayer


class PrefixStackHook(PrefixDecoderHook):
    """The hook on an encoder or a decoder, which also shifts positions that the stack counts itself."""

    def __init__(self, stack: Any, enclosing: Sequence[nn.Module] = ()) -> None:
        super().__init__(stack, enclosing)
        embedding = find_position_embedding(stack)
        if embedding is not None:
            self._embedding_parameters = list(inspect.signature(embedding.forward).parameters)
            self.add_handle(embedding.register_forward_pre_hook(self._before_embedding, with_kwargs=True))

    def _before_embedding(self, embedding: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        context = self.context
        if context is None or not context.is_running:
            return None
        kwargs = {**dict(zip(self._embedding_parameters, args, strict=False)), **kwargs}
        name = _past_length_argument(embedding) if kwargs.get("position_ids") is None else "position_ids"
        assert name is not None
        kwargs[name] = kwargs.get(name, 0) + context.batch.num_virtual_tokens
        return (), kwargs


class DecoderPrefix(PrefixExtLayer):
    """The prefix of the decoder's self-attention."""

    def _put_prefix(self, attention: Any, context: PrefixForwardContext, arguments: dict[str, Any]) -> None:
        cache = arguments.get(self._cache_argument)
        if isinstance(cache, EncoderDecoderCache):
            cache = arguments[self._cache_argument] = cache.self_attention_cache
        super()._put_prefix(attention, context, arguments)
        # T5's first layer computes the bias and passes it to the others.
        if getattr(attention, "has_relative_attention_bias", False) and arguments.get("position_bias") is None:
            past = 0 if cache is None else cache.get_seq_length(self.index)
            arguments["position_bias"] = relative_bias(attention, context, past, self._kv_length(context, cache))


class EncoderPrefix(DecoderPrefix):
    """The prefix of the encoder's self-attention, which is not causal and has no cache."""

    def _put_prefix(self, attention: Any, context: PrefixForwardContext, arguments: dict[str, Any]) -> None:
        put_needed_mask(context, arguments, self._mask_argument)
        super()._put_prefix(attention, context, arguments)

    def _mask(self, context: PrefixForwardContext, mask: torch.Tensor | None, kv_length: int) -> torch.Tensor | None:
        return None if mask is None else super()._mask(context, mask, kv_length)


class CrossPrefix(PrefixExtLayer):
    """The prefix of cross-attention, which has no positions."""

    def _put_prefix(self, attention: Any, context: PrefixForwardContext, arguments: dict[str, Any]) -> None:
        put_needed_mask(context, arguments, self._mask_argument)
        super()._put_prefix(attention, context, arguments)

    def _mask(self, context: PrefixForwardContext, mask: torch.Tensor | None, kv_length: int) -> torch.Tensor | None:
        return None if mask is None else super()._mask(context, mask, kv_length)

    def _kv_length(self, context: PrefixForwardContext, cache: Cache | None) -> int:
        return 0  # not needed: `None` stays `None`, and other masks have their length

    def _cache_view(self, cache: Any, prefix: LayerKV) -> CrossCacheView:
        return CrossCacheView(cache, prefix)


LAYER_CLASSES: dict[str, type[PrefixExtLayer]] = {
    DECODER: DecoderPrefix,
    CROSS: CrossPrefix,
    ENCODER: EncoderPrefix,
}


class CrossCacheView(EncoderDecoderCache):
    """Replaces the cache in the arguments of a cross-attention, which writes the encoder's K/V once and reads them later.

    Without a cache, as in training, nothing is written.
    """

    def __init__(self, cache: EncoderDecoderCache | None, prefix: LayerKV) -> None:
        self.is_updated = {} if cache is None else cache.is_updated
        written = None if cache is None else cache.cross_attention_cache
        self.cross_attention_cache: Any = _WrittenView(written, prefix)
        # Some modules ask it for a length that they do not use.
        self.self_attention_cache: Any = self.cross_attention_cache


class _WrittenView(PrefixCacheView):
    cache: Cache

    @property
    def layers(self) -> _WrittenView:
        return self

    def __getitem__(self, layer_idx: int) -> _WrittenLayer:
        return _WrittenLayer(self.cache.layers[layer_idx], self.prefix)


class _WrittenLayer:
    def __init__(self, written: Any, prefix: LayerKV) -> None:
        self.written, self.prefix = written, prefix

    @property
    def keys(self) -> torch.Tensor:
        return prepend(self.prefix.key, self.written.keys)

    @property
    def values(self) -> torch.Tensor:
        return prepend(self.prefix.value, self.written.values)


def put_needed_mask(context: PrefixForwardContext, arguments: dict[str, Any], mask_argument: str) -> None:
    """Puts a mask that shows all real tokens where there is none, if token dropout needs one to hide virtual tokens in.

    Args:
        context: The forward pass.
        arguments: The arguments of an attention module that is not causal.
        mask_argument: The name of the mask among them.
    """
    if context.kept_tokens is None or arguments.get(mask_argument) is not None:
        return
    queries, keys = arguments["hidden_states"], arguments.get("key_value_states")
    batch_size, kv_length = (queries if keys is None else keys).shape[:2]

    def make_mask() -> torch.Tensor:
        if context.is_flash:
            return queries.new_ones(batch_size, kv_length, dtype=torch.long)
        return queries.new_zeros(1, 1, 1, kv_length)  # not bool, which eager attention cannot add to the scores

    arguments[mask_argument] = context.compute_once("mask of all real tokens", make_mask)


def relative_bias(
    attention: Any, context: PrefixForwardContext, past: int | torch.Tensor, kv_length: int
) -> torch.Tensor:
    """Returns T5's bias over prefix and real tokens, `[b or 1, num_heads, q, p + kv_length]`.

    Distances between real tokens are the model's own, between columns. Distances to the prefix are those between
    positions: padding must not move it away.

    Args:
        attention: The attention module that has the bias.
        context: The forward pass.
        past: How many real tokens are cached.
        kv_length: The number of real tokens, cached and new.
    """
    p, q = context.batch.num_virtual_tokens, context.num_new_tokens
    text_bias = attention.compute_bias(q, kv_length, past_seen_tokens=past)
    # The bias of one query at the last position: the column at distance d is the d-th from the right.
    length = p + kv_length
    by_distance = attention.compute_bias(1, length, past_seen_tokens=length - 1)[0, :, 0]
    distances = context.positions[..., None].to(text_bias.device) - torch.arange(p, device=text_bias.device)
    prefix_bias = by_distance[:, length - 1 - distances].transpose(0, 1)
    return torch.cat([prefix_bias, text_bias.expand(prefix_bias.shape[0], -1, -1, -1)], dim=-1)


def find_position_embedding(stack: nn.Module) -> nn.Module | None:
    """Returns the module that embeds positions which a stack counts itself; `None` if there is none."""
    embedding = getattr(stack, "embed_positions", None)
    counts = isinstance(embedding, nn.Module) and _past_length_argument(embedding) is not None
    return embedding if counts else None


def _past_length_argument(embedding: nn.Module) -> str | None:
    """Returns the argument that is the number of cached tokens; transformers 5.24 renamed it."""
    parameters = inspect.signature(embedding.forward).parameters
    return next((name for name in ("cache_length", "past_key_values_length") if name in parameters), None)


def supports_prefix_positions(stack: nn.Module, attention: nn.Module) -> bool:
    """Whether the positions of a stack without `position_ids` can be shifted by a prefix."""
    if hasattr(attention, "compute_bias"):
        return "position_bias" in inspect.signature(attention.forward).parameters
    return find_position_embedding(stack) is not None
