"""Grouped-query attention with a mask, on a CPU: without a copy of the K/V for every query head of a group.

A prefix needs a mask where the model alone needs none, and where there is a mask transformers repeats the K/V of a group
for each of its heads, since CUDA's fused kernels take groups without a mask only. The CPU's take both; the repeated K/V
are not written, read back or kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# What changes the outcome of transformers' function, besides what `attend` hands on.
_OTHER_ARGUMENTS = ("position_bias", "cache")
# The attribute of a mask of booleans that holds what it adds to the scores, and of which state.
_ADDITIVE = "_prefix_ext_additive"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Takes the place of transformers' `sdpa_attention_forward`, which it calls but for attention modules with a prefix.

    Args:
        module: The attention module.
        query: `[b, num_heads, q, head_dim]`.
        key: `[b, num_kv_heads, p + k, head_dim]`, as `value`.
        attention_mask: `[b or 1, 1 or num_heads, q, p + k]`, bool or additive; `None` where no query is kept from any key.

    Returns:
        `[b, q, num_heads, head_dim]`, and no weights.
    """
    takes_groups = (
        hasattr(module, "prefix_ext")
        and query.device.type == "cpu"
        and getattr(module, "num_key_value_groups", 1) > 1
        and key.shape[-1] == value.shape[-1]
        and not any(kwargs.get(name) is not None for name in _OTHER_ARGUMENTS)
    )
    if attention_mask is None or not takes_groups:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    mask = additive(attention_mask, query.dtype)
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns what a mask of booleans adds to the scores: what the kernel takes, made and kept once for all layers.

    Layers are given the same mask, and it is the mask that remembers. Where nothing is kept for a backward pass, the kernel's
    own conversion will do.
    """
    # The compiler comes first: it cannot trace what follows.
    if torch.compiler.is_compiling() or mask.dtype != torch.bool or mask.is_inference() or not torch.is_grad_enabled():
        return mask
    state = dtype, mask._version  # which tells whether somebody wrote into it
    known_state, found = getattr(mask, _ADDITIVE, (None, mask))
    if known_state != state:
        found = mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
        setattr(mask, _ADDITIVE, (state, found))
    return found


def use_groups() -> None:
    """Registers `attend` with transformers, unless somebody else has registered an own `"sdpa"`, or it would not pay."""
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward and has_kernel():
        ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)


def has_kernel() -> bool:
    """Whether this torch has the kernel, or else it would repeat the K/V itself, and attend without a fused one."""
    query, key, mask = torch.zeros(1, 2, 1, 8), torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    chosen: int = torch._fused_sdp_choice(query, key, key, mask, enable_gqa=True)
    return chosen == SDPBackend.FLASH_ATTENTION.value
