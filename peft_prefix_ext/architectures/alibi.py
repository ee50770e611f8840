"""Distances told by a bias on the attention scores (ALiBi) and not by the keys: where the prefix stands in it.

Bloom and Falcon have a bias for each key, which grows with its position: the model's own function makes it anew, for the
prefix and the real tokens. MPT takes the distance between columns instead, as does the window of GPT-Neo: there the prefix
must stand in the columns right before the first real token, behind a row's left padding.

Shapes: b batch, h heads, q new tokens, k cached and new tokens, p virtual tokens.
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import torch
from torch import nn


def has_bias(attention: nn.Module) -> bool:
    """Whether an attention module is told distances by a bias, which takes the place of `position_ids`."""
    return not {"alibi", "position_bias"}.isdisjoint(inspect.signature(attention.forward).parameters)


def counts_columns(attention: Any) -> bool:
    """Whether an attention module takes the distance between two tokens for that between their columns."""
    return has_inverted_mask(attention) or (
        type(attention).__name__ == "GPTNeoSelfAttention" and attention.attention_type == "local"
    )


def has_inverted_mask(attention: Any) -> bool:
    """Whether a mask says which columns an attention module does *not* see."""
    return type(attention).__name__ == "MptAttention"


def extend_bias(
    attention: Any, alibi: torch.Tensor, mask: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the bias over prefix and real tokens, and the mask, into which Falcon adds the bias.

    Args:
        attention: The attention module.
        alibi: The model's own bias over real tokens, `[b * h, 1, k]` or `[b, h, 1, k]`.
        mask: Over prefix and real tokens, `[b, 1, q, p + k]`, or `[b, h, q, p + k]` with the bias of the real ones in it.
        seen: Which columns are tokens that a row has, `[b, p + k]`.
    """
    heads = attention.num_heads
    build = vars(sys.modules[type(attention).__module__])["build_alibi_tensor"]
    whole = build(seen, heads, dtype=alibi.dtype)
    by_head = whole.view(-1, heads, 1, seen.shape[1])
    if mask.shape[1] > 1:
        lowest = torch.finfo(mask.dtype).min
        mask = (by_head / math.sqrt(attention.head_dim)).masked_fill(mask < lowest / 2, lowest)
    return by_head if alibi.dim() == 4 else whole, mask


def columns_behind_padding(is_prefix_seen: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Returns the order, `[b, p + k]`, in which columns that begin with the prefix must stand.

    Args:
        is_prefix_seen: Which virtual tokens a row sees, `[b, p]`.
        padding: The model's mask of two dimensions, `[b, k]`.
    """
    is_text = padding.cumsum(dim=-1) > 0
    place = torch.cat([torch.where(is_prefix_seen, 2, 0), torch.where(is_text, 3, 1)], dim=-1)
    return place.argsort(dim=-1, stable=True)
