"""Attention masks with columns for the prefix, to the left of those for real tokens.

Shapes: b batch, q new tokens, k cached and new tokens, p virtual tokens (of the longest prefix in the batch).
"""

from __future__ import annotations

import torch


def prepend_prefix(
    mask: torch.Tensor | None,
    num_virtual_tokens: int,
    positions: torch.Tensor,
    kv_length: int,
    sliding_window: int | None,
    visible_tokens: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Returns the mask over prefix and real tokens, `[b or 1, 1, q, p + k]`; `None` if it is not needed.

    Every query sees the whole prefix of its row, also with padding or packing. In a layer with a sliding window the prefix leaves
    the window as other tokens do. The distance to it is that between positions, not between columns: padding between
    prefix and text must not push the prefix out of the window.

    Args:
        mask: The model's mask: `[b or 1, 1, q, k]`, bool or additive, or `None` (causal, or one query that sees all).
        num_virtual_tokens: p.
        positions: The positions of the queries, `[b or 1, q]`, counted from the first virtual token.
        kv_length: k.
        sliding_window: How many positions a query sees, itself included; `None` for all.
        visible_tokens: Which virtual tokens the queries see, `[b or 1, p]`; `None` if all see all.
    """
    p, q = num_virtual_tokens, positions.shape[-1]
    if mask is None:
        if q == 1 and sliding_window is None and visible_tokens is None:
            return None
        # transformers omits the mask of a prefill only if the cache is empty: query i sees columns 0..i, and not the unused
        # columns of a static cache behind them. A kernel's `is_causal` has no place for a prefix, so make the mask.
        mask = torch.ones(q, kv_length, dtype=torch.bool, device=positions.device)
        mask = (mask.tril() if q > 1 else mask)[None, None]
    visible = torch.ones(1, 1, q, p, dtype=torch.bool, device=mask.device)
    if visible_tokens is not None:
        visible = visible_tokens.to(mask.device)[:, None, None].expand(-1, 1, q, p)
    if sliding_window is not None:
        columns = torch.arange(p, device=mask.device)
        visible = visible & (columns > positions[..., None].to(mask.device) - sliding_window)[:, None]
    if mask.dtype != torch.bool:
        visible = torch.zeros(visible.shape, dtype=mask.dtype, device=mask.device).masked_fill_(
            ~visible, torch.finfo(mask.dtype).min
        )
    batch, heads = max(mask.shape[0], visible.shape[0]), mask.shape[1]
    return torch.cat([visible.expand(batch, heads, q, p), mask.expand(batch, heads, q, -1)], dim=-1)
