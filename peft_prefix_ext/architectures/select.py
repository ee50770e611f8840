"""Attention layers of decoders that need more than a mask with columns for the prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_prefix_ext.architectures.alibi import counts_columns, extend_bias, has_inverted_mask
from peft_prefix_ext.base_model.layers import ProbedLayer
from peft_prefix_ext.injection.forward_context import PrefixForwardContext
from peft_prefix_ext.injection.layer import PrefixExtLayer


def layer_class(attention: nn.Module, recorded: ProbedLayer) -> type[PrefixExtLayer]:
    """Returns the class of the prefix of a decoder's attention module."""
    if recorded.is_chunked:
        return ChunkedPrefix
    if counts_columns(attention):
        return ColumnPrefix
    return BiasedPrefix


class BiasedPrefix(PrefixExtLayer):
    """The prefix where a bias by key may tell distances (Bloom, Falcon)."""

    def _put_prefix(self, attention: Any, step: PrefixForwardContext, named: dict[str, Any]) -> None:
        super()._put_prefix(attention, step, named)
        bias = named.get("alibi")
        if bias is not None:
            seen = step.seen(bias.numel() // (attention.num_heads * bias.shape[-1]), bias.shape[-1])
            named["alibi"], named["attention_mask"] = extend_bias(attention, bias, named["attention_mask"], seen)


class ColumnPrefix(PrefixExtLayer):
    """The prefix where distances are those between columns (MPT, GPT-Neo): it stands behind a row's left padding."""

    def _put_prefix(self, attention: Any, step: PrefixForwardContext, named: dict[str, Any]) -> None:
        super()._put_prefix(attention, step, named)
        mask, order = named["attention_mask"], step.order()
        if order is not None:
            named[self._cache_argument].order = order
            mask = mask.expand(len(order), -1, -1, -1)
            mask = mask.gather(-1, order[:, None, None].expand_as(mask))
        named["attention_mask"] = ~mask if has_inverted_mask(attention) else mask

    def _mask(self, step: PrefixForwardContext, mask: torch.Tensor | None, kv_length: int) -> torch.Tensor | None:
        inverted = mask is not None and mask.dtype == torch.bool  # only MPT's
        return super()._mask(step, ~mask if inverted and mask is not None else mask, kv_length)


class ChunkedPrefix(PrefixExtLayer):
    """The prefix where queries see their own chunk of positions (Llama 4)."""

    def _put_prefix(self, attention: Any, step: PrefixForwardContext, named: dict[str, Any]) -> None:
        cache = named.get(self._cache_argument)
        super()._put_prefix(attention, step, named)
        past, sizes = 0, (step.positions.shape[-1], 0)
        if cache is not None:
            past, sizes = cache.get_seq_length(self.index), cache.get_mask_sizes(step.positions.shape[-1], self.index)
        named["attention_mask"] = step.chunked_mask(named["attention_mask"], past, *sizes, self.sliding_window or 1)
