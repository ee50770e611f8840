"""Attention within chunks of positions (Llama 4).

The prefix takes the first positions of the first chunk and shifts the real tokens, so the boundaries of the model's own
mask, which counts real tokens alone, are in the wrong places. The mask is made anew, from positions. Tokens of later
chunks do not see the prefix, just as tokens far behind it do not with a sliding window.

Shapes: b batch, q new tokens, k cached and new tokens, p virtual tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from peft_prefix_ext.injection.forward_context import PrefixForwardContext
from peft_prefix_ext.injection.layer import PrefixExtLayer
from peft_prefix_ext.injection.position_ids import seen_columns, text_columns


class ChunkedPrefix(PrefixExtLayer):
    """The prefix of an attention module whose queries see their own chunk of positions."""

    def _put_prefix(self, attention: Any, context: PrefixForwardContext, arguments: dict[str, Any]) -> None:
        cache, num_new = arguments.get(self._cache_argument), context.num_new_tokens
        super()._put_prefix(attention, context, arguments)
        past, (kv_length, kv_offset) = 0, (num_new, 0)
        if cache is not None:
            past = cache.get_seq_length(self.index)
            kv_length, kv_offset = cache.get_mask_sizes(num_new, self.index)

        def make_mask() -> torch.Tensor:
            return self._chunked_mask(context, past, kv_length, kv_offset)

        visible, mask = context.compute_once("chunked_mask", make_mask), arguments["attention_mask"]
        if mask is not None and mask.dtype != torch.bool:
            lowest = torch.finfo(mask.dtype).min
            visible = mask.new_zeros(visible.shape).masked_fill_(~visible, lowest)
        arguments["attention_mask"] = visible

    def _chunked_mask(self, context: PrefixForwardContext, past: int, kv_length: int, kv_offset: int) -> torch.Tensor:
        padding_mask = None if context.decoder_mask is None else padding_of(context, past)
        if context.batch.lengths is not None:
            raise ValueError("Prefixes of different lengths in one batch are not supported with chunked attention.")
        return chunked_mask(
            context.batch.num_virtual_tokens,
            context.positions,
            padding_mask,
            past,
            kv_length,
            kv_offset,
            self.sliding_window or 1,
            context.kept_tokens,
        )


def chunked_mask(
    num_virtual_tokens: int,
    positions: torch.Tensor,
    padding_mask: torch.Tensor | None,
    past: int,
    kv_length: int,
    kv_offset: int,
    chunk_size: int,
    kept_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns which columns of prefix and cache the new tokens see, `[b or 1, 1, q, p + k]`.

    Args:
        num_virtual_tokens: p.
        positions: The positions of the new tokens, `[b or 1, q]`, counted from the first virtual token.
        padding_mask: The model's mask of two dimensions, over all real tokens so far; `None` without padding. Without it
            and without a cache, positions that start anew begin another sequence, packed into the same row.
        past: How many real tokens precede the new ones.
        kv_length: k.
        kv_offset: How many real tokens have left the cache.
        chunk_size: How many positions a chunk has.
        kept_tokens: Which virtual tokens are not dropped, `[p]`; `None` if all are kept.
    """
    q, device = positions.shape[-1], positions.device
    columns = torch.arange(kv_length, device=device) + kv_offset
    visible = columns <= torch.arange(q, device=device)[:, None] + past
    if padding_mask is not None:
        text = padding_mask.to(device).bool()
        first = (text.cumsum(dim=-1) == 0).sum(dim=-1, keepdim=True)
        key_positions = columns - first + num_virtual_tokens
        text = torch.nn.functional.pad(text, (0, max(0, kv_length + kv_offset - text.shape[1])))
        visible = visible & text[:, None, kv_offset : kv_offset + kv_length]
    elif past == 0 and kv_length == q:
        key_positions = positions
        sequence = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(dim=-1)
        visible = visible & (sequence[:, None] == sequence[..., None])
    else:
        key_positions = columns[None] + num_virtual_tokens
    virtual = torch.arange(num_virtual_tokens, device=device).expand(len(key_positions), -1)
    all_positions = torch.cat([virtual, key_positions], dim=-1)
    kept = visible.new_ones(num_virtual_tokens) if kept_tokens is None else kept_tokens.to(device)
    visible = torch.cat([kept.expand(*visible.shape[:-1], -1), visible], dim=-1)
    return (visible & (all_positions[:, None] // chunk_size == positions[..., None] // chunk_size))[:, None]


def padding_of(context: PrefixForwardContext, past: int) -> torch.Tensor:
    """Returns which real tokens are not padding, `[b, past + q]`, of a mask of any form, such as those of `generate`.

    Raises:
        ValueError: If the mask hides more than padding and later tokens.
    """
    if context.padding_mask is not None:
        return context.padding_mask
    mask, q = context.decoder_mask, context.num_new_tokens
    full: Any = mask.get("full_attention") if isinstance(mask, dict) else mask
    columns = text_columns(full) if isinstance(full, torch.Tensor) else None
    if columns is not None and columns.shape[1] >= past + q:
        k = columns.shape[1]
        last_seen = torch.arange(q, device=columns.device)[:, None] + past
        causal = (torch.arange(k, device=columns.device) <= last_seen) & columns[:, None, None].bool()
        seen = seen_columns(full)
        if seen.shape[-1] == k and torch.equal(seen.expand_as(causal), causal):
            return columns[:, : past + q]
    raise ValueError(
        "PREFIX_EXT makes the masks of chunked attention from an `attention_mask` of two dimensions, which marks padding; "
        "got another one."
    )
