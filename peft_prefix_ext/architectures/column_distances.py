"""Attention whose distances are those between columns and not between positions: MPT's biases, GPT-Neo's local windows.

Left padding would stand between prefix and text and push the prefix away. So the columns are reordered: the prefix
stands right before the first real token of each row.

Shapes: b batch, q new tokens, k cached and new tokens, p virtual tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from peft_prefix_ext.injection.forward_context import PrefixForwardContext
from peft_prefix_ext.injection.layer import PrefixExtLayer


class ColumnPrefix(PrefixExtLayer):
    """The prefix of an attention module that goes by the distance between columns."""

    def _put_prefix(self, attention: Any, context: PrefixForwardContext, arguments: dict[str, Any]) -> None:
        super()._put_prefix(attention, context, arguments)
        mask, order = arguments["attention_mask"], column_order(context)
        if order is not None:
            arguments[self._cache_argument].order = order
            mask = mask.expand(len(order), -1, -1, -1)
            mask = mask.gather(-1, order[:, None, None].expand_as(mask))
        arguments["attention_mask"] = ~mask if has_inverted_mask(attention) else mask

    def _mask(self, context: PrefixForwardContext, mask: torch.Tensor | None, kv_length: int) -> torch.Tensor | None:
        if mask is not None and mask.dtype == torch.bool:  # only MPT's masks are bool
            mask = ~mask
        return super()._mask(context, mask, kv_length)


def uses_column_distances(attention: Any) -> bool:
    """Whether an attention module takes the distance between two tokens to be that between their columns."""
    return has_inverted_mask(attention) or (
        type(attention).__name__ == "GPTNeoSelfAttention" and attention.attention_type == "local"
    )


def has_inverted_mask(attention: Any) -> bool:
    """Whether the mask of an attention module is True for the columns that a query does *not* see."""
    return type(attention).__name__ == "MptAttention"


def column_order(context: PrefixForwardContext) -> torch.Tensor | None:
    """Returns the order of the columns of prefix and real tokens, `[b, p + k]`; `None` to leave them as they are."""
    padding_mask, batch = context.padding_mask, context.batch
    if padding_mask is None or (batch.lengths is None and bool(padding_mask[:, 0].all())):
        return None
    return put_prefix_behind_padding(context.prefix_columns(len(padding_mask)), padding_mask)


def put_prefix_behind_padding(prefix_columns: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
    """Returns the order of columns, `[b, p + k]`, in which the prefix stands between a row's left padding and its text.

    Args:
        prefix_columns: Which columns are virtual tokens of a row, `[b, p]`.
        padding_mask: The model's mask of two dimensions, `[b, k]`.
    """
    is_text = padding_mask.cumsum(dim=-1) > 0
    rank = torch.cat([torch.where(prefix_columns, 2, 0), torch.where(is_text, 3, 1)], dim=-1)
    return rank.argsort(dim=-1, stable=True)
