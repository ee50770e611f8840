"""The state of one forward pass with a prefix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from peft_prefix_ext.architectures.alibi import columns_behind_padding
from peft_prefix_ext.architectures.chunked import chunked_mask
from peft_prefix_ext.attention.flash import flash_mask
from peft_prefix_ext.attention.flex import prepend_prefix_blocks
from peft_prefix_ext.attention.masks import prepend_prefix
from peft_prefix_ext.checkpoint.format import LayerKV
from peft_prefix_ext.injection.batch import BatchAdapters
from peft_prefix_ext.injection.dropout import PrefixDropout
from peft_prefix_ext.injection.position_ids import seen_columns, text_columns

# The attribute of a forward pass' positions that holds its `PrefixForwardContext`.
CONTEXT = "_prefix_ext_step"


@dataclass
class PrefixForwardContext:
    """One forward pass of the decoder with a prefix.

    Args:
        batch: The prefixes of the batch.
        positions: The positions of the new tokens, `[b or 1, q]`, counted from the first virtual token.
        states: What the reparameterization of each adapter depends on, see `memo.py`.
        given_mask: The mask that the decoder was given.
        is_flash: Whether the attention is flash attention.
        residuals: What it adds to the K/V, by adapter and attention module; empty without one.
        dropout: Of the prefix, in training.
        projected: The leaf that the residuals are part of and the reparameterization's output that awaits its gradient,
            under reentrant gradient checkpointing only.
        running: Whether the forward pass is under way.
    """

    batch: BatchAdapters
    positions: torch.Tensor
    states: dict[str, Any]
    given_mask: Any = None
    is_flash: bool = False
    residuals: dict[str, dict[str, LayerKV]] = field(default_factory=dict)
    dropout: PrefixDropout | None = None
    projected: tuple[torch.Tensor, torch.Tensor] | None = None
    running: bool = True
    _masks: list[tuple[Any, int | None, Any]] = field(default_factory=list)
    _chunked: torch.Tensor | None = None

    @property
    def is_decoding(self) -> bool:
        """Whether a single token is under way."""
        return self.positions.shape[-1] == 1

    @property
    def padding(self) -> torch.Tensor | None:
        """Which real tokens are text, `[b, k]`; `None` when all are."""
        return self.given_mask if isinstance(self.given_mask, torch.Tensor) and self.given_mask.dim() == 2 else None

    def is_prefix_seen(self, batch_size: int) -> torch.Tensor:
        """Which virtual tokens each row sees, `[b, p]`."""
        columns = torch.arange(self.batch.num_virtual_tokens, device=self.positions.device).expand(batch_size, -1)
        return columns >= 0 if self.batch.lengths is None else columns < self.batch.lengths

    def seen(self, batch_size: int, kv_length: int) -> torch.Tensor:
        """Which columns of prefix and real tokens are tokens that a row has, `[b, p + k]`."""
        prefix = self.is_prefix_seen(batch_size)
        text = prefix.new_ones(batch_size, kv_length) if self.padding is None else self.padding
        return torch.cat([prefix.long(), text.long()], dim=-1)

    def order(self) -> torch.Tensor | None:
        """In which order columns must stand where distances are those between columns, `[b, p + k]`, if not as they are."""
        padding = self.padding
        if padding is None or (self.batch.lengths is None and bool(padding[:, 0].all())):
            return None
        return columns_behind_padding(self.is_prefix_seen(len(padding)), padding)

    def mask(self, mask: Any, kv_length: int, sliding_window: int | None) -> Any:
        """Returns the mask over prefix and real tokens, computed once for all layers that were given the same mask."""
        for given, window, extended in self._masks:
            if given is mask and window == sliding_window:
                return extended
        if self.is_flash:
            rows = self.batch.lengths if mask is None else mask
            extended = flash_mask(mask, None if rows is None else self.is_prefix_seen(len(rows)), kv_length)
        elif isinstance(mask, BlockMask):
            extended = prepend_prefix_blocks(
                mask, self.batch.num_virtual_tokens, self.positions, sliding_window, self.batch.lengths
            )
        else:
            extended = prepend_prefix(
                mask, self.batch.num_virtual_tokens, self.positions, kv_length, sliding_window, self.batch.lengths
            )
        self._masks.append((mask, sliding_window, extended))
        return extended

    def mask_of_last(self, num_queries: int, sliding_window: int | None) -> Any:
        """Returns the rows of the last queries in the mask that an earlier layer with these windows was given.

        Raises:
            ValueError: If it has no rows.
        """
        extended = next(extended for _, window, extended in self._masks if window == sliding_window)
        if isinstance(extended, BlockMask):
            raise ValueError("Layers that share K/V do not go with flex attention and a prefix here: use sdpa.")
        is_by_query = isinstance(extended, torch.Tensor) and extended.dim() == 4
        return extended[:, :, -num_queries:] if is_by_query else extended

    def chunked_mask(
        self, mask: torch.Tensor | None, past: int, kv_length: int, kv_offset: int, chunk_size: int
    ) -> torch.Tensor:
        """Returns `chunked_mask(...)` in the manner of the layer's own `mask`, computed once for all such layers."""
        if self._chunked is None:
            padding = self.padding if self.given_mask is None else self._padding_of_given(past)
            if self.batch.lengths is not None:
                raise ValueError("Prefixes of several lengths in one batch do not go with chunked attention.")
            p = self.batch.num_virtual_tokens
            self._chunked = chunked_mask(p, self.positions, padding, past, kv_length, kv_offset, chunk_size)
        if mask is None or mask.dtype == torch.bool:
            return self._chunked
        lowest = torch.finfo(mask.dtype).min
        return mask.new_zeros(self._chunked.shape).masked_fill_(~self._chunked, lowest)

    def _padding_of_given(self, past: int) -> torch.Tensor:
        """Returns which real tokens are text, `[b, past + q]`, of masks that `generate` made ready, too.

        Raises:
            ValueError: If a mask keeps more apart than padding from text.
        """
        if (padding := self.padding) is not None:
            return padding
        full: Any = self.given_mask.get("full_attention") if isinstance(self.given_mask, dict) else self.given_mask
        columns = text_columns(full) if isinstance(full, torch.Tensor) else None
        if columns is not None and columns.shape[1] >= past + self.positions.shape[-1]:
            q, k = self.positions.shape[-1], columns.shape[1]
            rows = torch.arange(q, device=columns.device)[:, None] + past
            causal = (torch.arange(k, device=columns.device) <= rows) & columns[:, None, None].bool()
            seen = seen_columns(full)
            if seen.shape[-1] == k and torch.equal(seen.expand_as(causal), causal):
                return columns[:, : past + q]
        raise ValueError("PREFIX_EXT makes the masks of chunked attention itself: give one of two dimensions.")
