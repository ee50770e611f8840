"""Attention masks with columns for the prefix, to the left of the real tokens' columns.

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
    lengths: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Returns the mask over prefix and real tokens.

    Every query sees the whole prefix, whatever its padding or packing, except that in a layer with a sliding window the
    prefix slides out of it as any other token does. Distances are taken between positions, not between columns: padding
    between prefix and text must not push the prefix out.

    Args:
        mask: The model's own mask: `None` (causal, or a single query that sees all), or `[b or 1, 1, q, k]`, bool or additive.
        num_virtual_tokens: p.
        positions: `[b or 1, q]`, of the queries, counted from the first virtual token.
        kv_length: k.
        sliding_window: How many positions a query sees, itself included; `None` for all.
        lengths: How many of the virtual tokens each row has, `[b, 1]`; `None` when all have p.
    """
    p, q = num_virtual_tokens, positions.shape[-1]
    if mask is None:
        if q == 1 and sliding_window is None and lengths is None:
            return None
        # transformers leaves the mask out of a prefill only when the cache is empty: query i sees columns 0..i, and what
        # a static cache has behind them is not seen. `is_causal` of a fused kernel knows no prefix: spell it out.
        mask = torch.ones(q, kv_length, dtype=torch.bool, device=positions.device)
        mask = (mask.tril() if q > 1 else mask)[None, None]
    visible = torch.ones(1, 1, q, p, dtype=torch.bool, device=mask.device)
    columns = torch.arange(p, device=mask.device)
    if lengths is not None:
        visible = (columns < lengths.to(mask.device))[:, None, None].expand(-1, 1, q, p)
    if sliding_window is not None:
        visible = visible & (columns > positions[..., None].to(mask.device) - sliding_window)[:, None]
    if mask.dtype != torch.bool:
        visible = torch.zeros(visible.shape, dtype=mask.dtype, device=mask.device).masked_fill_(
            ~visible, torch.finfo(mask.dtype).min
        )
    batch, heads = max(mask.shape[0], visible.shape[0]), mask.shape[1]
    return torch.cat([visible.expand(batch, heads, q, p), mask.expand(batch, heads, q, -1)], dim=-1)
