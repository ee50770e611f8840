"""Grouped-query attention with a mask on a CPU, without a copy of the K/V for every query head of a group.

A prefix needs a mask where the base model needs none. With a mask, transformers repeats the K/V for each head of a
group, because CUDA's fused kernels take groups only without a mask. The CPU kernel takes both, so the repeated K/V are
neither written nor kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Arguments that change what transformers' function computes and that the kernel call here leaves out.
_OTHER_ARGUMENTS = ("position_bias", "cache")
# The attribute of a boolean mask that holds its additive form, and the dtype and version that it was made for.
_ADDITIVE = "_prefix_ext_additive"


def grouped_query_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Replaces transformers' `sdpa_attention_forward`, which it calls for all modules without a prefix.

    Args:
        module: The attention module.
        query: `[b, num_heads, q, head_dim]`.
        key: `[b, num_kv_heads, p + k, head_dim]`.
        value: `[b, num_kv_heads, p + k, head_dim]`.
        attention_mask: `[b or 1, 1 or num_heads, q, p + k]`, bool or additive; `None` if every query sees every key.
        dropout: The probability of an attention weight to be zeroed.
        scaling: The factor of the scores; `None` for 1 / sqrt(head_dim).
        kwargs: Other arguments of `sdpa_attention_forward`.

    Returns:
        The output, `[b, q, num_heads, head_dim]`, and `None` for the attention weights.
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
    mask = additive_mask(attention_mask, query.dtype)
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the additive form of a boolean mask, `[b or 1, 1 or num_heads, q, p + k]`, made once for all layers.

    It is kept as an attribute of the mask, which all layers share. Without gradients the mask is returned as it is: the
    kernel then converts it itself, and nothing is kept for a backward pass.
    """
    # The compiler comes first: it cannot trace the other conditions.
    if torch.compiler.is_compiling() or mask.dtype != torch.bool or mask.is_inference() or not torch.is_grad_enabled():
        return mask
    state = dtype, mask._version  # the version changes with every in-place write
    known_state, additive = getattr(mask, _ADDITIVE, (None, mask))
    if known_state != state:
        additive = mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
        setattr(mask, _ADDITIVE, (state, additive))
    return additive


def register_grouped_query_attention() -> None:
    """Registers the function with transformers as `"sdpa"`, unless another one is registered or the kernel is missing."""
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward and has_fused_kernel():
        ALL_ATTENTION_FUNCTIONS.register("sdpa", grouped_query_attention_forward)


def has_fused_kernel() -> bool:
    """Whether this torch has a fused CPU kernel for groups with a mask. Without one it would repeat the K/V itself."""
    query, key, mask = torch.zeros(1, 2, 1, 8), torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    backend: int = torch._fused_sdp_choice(query, key, key, mask, enable_gqa=True)
    return backend == SDPBackend.FLASH_ATTENTION.value
