"""What a prefix needs in an encoder-decoder model (T5, BART and their kin) besides what it needs in a decoder.

Two stacks, each with a runtime of its own, and three kinds of attention: in the decoder's self-attention the prefix stands
before the decoder's tokens, in the encoder's before the encoder's, in cross-attention before what the encoder says, as Li
& Liang (2021) have it for BART. In both stacks real tokens start at position p. These models are not given positions:
some embed them, some add a bias by distance to the scores of attention.
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
    """The runtime of an encoder or a decoder: moves positions that the stack embeds by itself."""

    def __init__(self, stack: Any, around: Sequence[nn.Module] = ()) -> None:
        super().__init__(stack, around)
        embedding = embedded_positions(stack)
        if embedding is not None:
            self._arguments_of_embedding = list(inspect.signature(embedding.forward).parameters)
            self._handles.append(embedding.register_forward_pre_hook(self._before_embedding, with_kwargs=True))

    def _before_embedding(self, embedding: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        step = self.step
        if step is None or not step.running:
            return None
        kwargs = {**dict(zip(self._arguments_of_embedding, args, strict=False)), **kwargs}
        given = _length_argument(embedding) if kwargs.get("position_ids") is None else "position_ids"
        assert given is not None
        kwargs[given] = kwargs.get(given, 0) + step.batch.num_virtual_tokens
        return (), kwargs


class DecoderPrefix(PrefixExtLayer):
    """The prefix of a self-attention in the decoder."""

    def _put_prefix(self, attention: Any, step: PrefixForwardContext, named: dict[str, Any]) -> None:
        cache = named.get(self._cache_argument)
        if isinstance(cache, EncoderDecoderCache):
            cache = named[self._cache_argument] = cache.self_attention_cache
        super()._put_prefix(attention, step, named)
        # T5's first layer makes the bias, the others are handed it.
        if getattr(attention, "has_relative_attention_bias", False) and named.get("position_bias") is None:
            past = 0 if cache is None else cache.get_seq_length(self.index)
            named["position_bias"] = relative_bias(attention, step, past, self._kv_length(step, cache))


class EncoderPrefix(DecoderPrefix):
    """The prefix of a self-attention in the encoder, where every token sees every other and nothing is cached."""

    def _mask(self, step: PrefixForwardContext, mask: torch.Tensor | None, kv_length: int) -> torch.Tensor | None:
        return None if mask is None else super()._mask(step, mask, kv_length)


class CrossPrefix(PrefixExtLayer):
    """The prefix of a cross-attention, where there are no positions."""

    def _mask(self, step: PrefixForwardContext, mask: torch.Tensor | None, kv_length: int) -> torch.Tensor | None:
        return None if mask is None else super()._mask(step, mask, kv_length)

    def _kv_length(self, step: PrefixForwardContext, cache: Cache | None) -> int:
        return 0  # only a mask that the model leaves out would have to be made

    def _view(self, cache: Any, prefix: LayerKV) -> CrossCacheView:
        return CrossCacheView(cache, prefix)


LAYERS: dict[str, type[PrefixExtLayer]] = {DECODER: DecoderPrefix, CROSS: CrossPrefix, ENCODER: EncoderPrefix}


class CrossCacheView(EncoderDecoderCache):
    """Takes the cache's place inside one cross-attention, which writes the encoder's K/V once and then reads them off.

    Without a cache, as in training, nothing is written.
    """

    def __init__(self, cache: EncoderDecoderCache | None, prefix: LayerKV) -> None:
        self.is_updated = {} if cache is None else cache.is_updated
        written = None if cache is None else cache.cross_attention_cache
        self.cross_attention_cache: Any = _WrittenView(written, prefix)
        # Asked for a length that cross-attention has no use for.
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


def relative_bias(attention: Any, step: PrefixForwardContext, past: int | torch.Tensor, kv_length: int) -> torch.Tensor:
    """Returns T5's bias over prefix and real tokens, `[b or 1, num_heads, q, p + kv_length]`.

    Real tokens are told their distances by the model itself, between columns. Those to the prefix are taken between
    positions: padding must not push it away.
    """
    p, (_, q) = step.batch.num_virtual_tokens, step.positions.shape
    own = attention.compute_bias(q, kv_length, past_seen_tokens=past)
    # Seen from the last position of all, the column of distance d is the d-th from the right.
    reach = p + kv_length
    by_column = attention.compute_bias(1, reach, past_seen_tokens=reach - 1)[0, :, 0]
    distances = step.positions[..., None].to(own.device) - torch.arange(p, device=own.device)
    prefix = by_column[:, reach - 1 - distances].transpose(0, 1)
    return torch.cat([prefix, own.expand(prefix.shape[0], -1, -1, -1)], dim=-1)


def embedded_positions(stack: nn.Module) -> nn.Module | None:
    """Returns the module by which a stack embeds positions that it counts by itself, if any."""
    embedding = getattr(stack, "embed_positions", None)
    counts = isinstance(embedding, nn.Module) and _length_argument(embedding) is not None
    return embedding if counts else None


def _length_argument(embedding: nn.Module) -> str | None:
    """Returns what an embedding of positions calls the number of tokens before the new ones; transformers 5.24 renamed it."""
    parameters = inspect.signature(embedding.forward).parameters
    return next((name for name in ("cache_length", "past_key_values_length") if name in parameters), None)


def tells_positions(stack: nn.Module, attention: nn.Module) -> bool:
    """Whether a prefix can stand before the input of a stack that is not given positions."""
    if hasattr(attention, "compute_bias"):
        return "position_bias" in inspect.signature(attention.forward).parameters
    return embedded_positions(stack) is not None
