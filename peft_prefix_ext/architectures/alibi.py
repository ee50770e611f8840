"""Attention with linear biases by position (ALiBi, Press et al. 2022, arXiv:2108.12409) in Bloom and Falcon.

The model adds a bias to the scores of each key, which grows with the key's position. With a prefix, the bias is made
anew over prefix and real tokens by the model's own function. MPT, whose biases go by columns, is in `column_distances`.

Shapes: b batch, h heads, q new tokens, k cached and new tokens, p virtual tokens.
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import torch
from torch import nn

from peft_prefix_ext.injection.forward_context import PrefixForwardContext
from peft_prefix_ext.injection.layer import PrefixExtLayer


class BiasedPrefix(PrefixExtLayer):
    """The prefix of an attention module that may take an ALiBi bias."""

    def _put_prefix(self, attention: Any, context: PrefixForwardContext, arguments: dict[str, Any]) -> None:
        super()._put_prefix(attention, context, arguments)
        bias = arguments.get("alibi")
        if bias is not None:
            batch_size = bias.numel() // (attention.num_heads * bias.shape[-1])
            tokens = context.token_columns(batch_size, bias.shape[-1])
            arguments["alibi"], arguments["attention_mask"] = extend_bias(
                attention, bias, arguments["attention_mask"], tokens
            )


def takes_position_bias(attention: nn.Module) -> bool:
    """Whether an attention module takes a bias by position in place of `position_ids`."""
    return not {"alibi", "position_bias"}.isdisjoint(inspect.signature(attention.forward).parameters)


def extend_bias(
    attention: Any, alibi: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the bias over prefix and real tokens, and the mask, in which Falcon has the bias too.

    Args:
        attention: The attention module.
        alibi: The model's bias over real tokens, `[b * h, 1, k]` or `[b, h, 1, k]`.
        mask: The mask over prefix and real tokens, `[b, 1, q, p + k]`, or `[b, h, q, p + k]` with the bias of the real
            tokens added.
        tokens: Which columns are tokens and not padding, `[b, p + k]`.
    """
    heads = attention.num_heads
    build_alibi_tensor = vars(sys.modules[type(attention).__module__])["build_alibi_tensor"]
    bias = build_alibi_tensor(tokens, heads, dtype=alibi.dtype)
    by_head = bias.view(-1, heads, 1, tokens.shape[1])
    if mask.shape[1] > 1:
        lowest = torch.finfo(mask.dtype).min
        mask = (by_head / math.sqrt(attention.head_dim)).masked_fill(mask < lowest / 2, lowest)
    return by_head if alibi.dim() == 4 else bias, mask
