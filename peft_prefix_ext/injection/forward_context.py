"""`PrefixForwardContext`: what one forward pass of the decoder knows of its prefixes.

Shapes: b batch, q new tokens, k cached and new tokens, p virtual tokens (of the longest prefix in the batch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.nn.attention.flex_attention import BlockMask

from peft_prefix_ext.attention.flash import flash_mask
from peft_prefix_ext.attention.flex import prepend_prefix_blocks
from peft_prefix_ext.attention.masks import prepend_prefix
from peft_prefix_ext.checkpoint.format import LayerKV
from peft_prefix_ext.injection.batch import BatchAdapters
from peft_prefix_ext.injection.dropout import PrefixDropout

# The attribute of a forward pass' `position_ids` that holds its `PrefixForwardContext`.
CONTEXT = "_prefix_ext_context"
T = TypeVar("T")


@dataclass
class PrefixForwardContext:
    """One forward pass of the decoder with a prefix.

    Args:
        batch: The prefix of each row.
        batch_size: b.
        positions: The positions of the new tokens, `[b or 1, q]`, counted from the first virtual token.
        reparam_state: What the output of each adapter's reparameterization depends on, see `memoize_for_decoding`.
        decoder_mask: The `attention_mask` of the decoder.
        is_flash: Whether the model runs flash attention.
        residuals: What the reparameterization adds to the K/V, by adapter and attention module; empty without one.
        dropout: The dropout of elements of the prefix, in training.
        kept_tokens: Which virtual tokens token dropout keeps, `[p]`; `None` without it.
        projected: Under reentrant gradient checkpointing, the detached output of the reparameterization, which the
            residuals are views of, and the output that is to receive its gradient.
        sequences: The packed sequence that each token is of, `[b or 1, q]`, where that matters; see `sequences.py`.
        is_running: Whether the forward pass has not ended yet.
    """

    batch: BatchAdapters
    batch_size: int
    positions: torch.Tensor
    reparam_state: dict[str, Any]
    decoder_mask: Any = None
    is_flash: bool = False
    residuals: dict[str, dict[str, LayerKV]] = field(default_factory=dict)
    dropout: PrefixDropout | None = None
    kept_tokens: torch.Tensor | None = None
    projected: tuple[torch.Tensor, torch.Tensor] | None = None
    sequences: torch.Tensor | None = None
    is_running: bool = True
    _masks: list[tuple[Any, int | None, Any]] = field(default_factory=list)
    _computed: dict[str, Any] = field(default_factory=dict)

    @property
    def num_new_tokens(self) -> int:
        """q."""
        return self.positions.shape[-1]

    @property
    def is_decoding(self) -> bool:
        """Whether there is one new token."""
        return self.num_new_tokens == 1

    @property
    def padding_mask(self) -> torch.Tensor | None:
        """The decoder's mask of two dimensions, `[b, k]`, 0 for padding; `None` if it has none."""
        mask = self.decoder_mask
        return mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    @property
    def visible_tokens(self) -> torch.Tensor | None:
        """Which virtual tokens the queries see, `[b or 1, p]`; `None` if all see all."""
        kept = self.kept_tokens
        if self.batch.lengths is None:
            return None if kept is None else kept[None]
        columns = self.prefix_columns(len(self.batch.lengths))
        return columns if kept is None else columns & kept

    def prefix_columns(self, batch_size: int) -> torch.Tensor:
        """Returns which columns are virtual tokens of a row, dropped or not, `[b, p]`."""
        columns = torch.arange(self.batch.num_virtual_tokens, device=self.positions.device).expand(batch_size, -1)
        return columns >= 0 if self.batch.lengths is None else columns < self.batch.lengths

    def token_columns(self, batch_size: int, kv_length: int) -> torch.Tensor:
        """Returns which columns are virtual tokens or text of a row, and not padding, `[b, p + k]`."""
        prefix = self.prefix_columns(batch_size)
        text = prefix.new_ones(batch_size, kv_length) if self.padding_mask is None else self.padding_mask
        return torch.cat([prefix.long(), text.long()], dim=-1)

    def mask(self, mask: Any, kv_length: int, sliding_window: int | None) -> Any:
        """Returns the mask over prefix and real tokens, made once for all layers with the same mask and window.

        Args:
            mask: The mask that the model passes to the layer.
            kv_length: k.
            sliding_window: How many positions a query sees, itself included; `None` for all.

        Raises:
            ValueError: If token dropout meets flex attention.
        """
        for layer_mask, window, extended in self._masks:
            if layer_mask is mask and window == sliding_window:
                return extended
        p, visible = self.batch.num_virtual_tokens, self.visible_tokens
        if self.is_flash:
            if visible is None and mask is not None:
                visible = self.prefix_columns(self.batch_size)
            extended = flash_mask(mask, None if visible is None else visible.expand(self.batch_size, p), kv_length)
        elif isinstance(mask, BlockMask):
            if self.kept_tokens is not None:
                raise ValueError(
                    "`token_dropout` is not supported with flex attention; use attn_implementation='sdpa'."
                )
            extended = prepend_prefix_blocks(mask, p, self.positions, sliding_window, self.batch.lengths)
        else:
            extended = prepend_prefix(mask, p, self.positions, kv_length, sliding_window, visible)
        self._masks.append((mask, sliding_window, extended))
        return extended

    def earlier_mask(self, sliding_window: int | None) -> Any:
        """Returns the mask over prefix and real tokens of the first layer with this window."""
        return next(extended for _, window, extended in self._masks if window == sliding_window)

    def compute_once(self, name: str, compute: Callable[[], T]) -> T:
        """Returns `compute()`, or what it returned when a layer of this forward pass first asked for `name`."""
        if name not in self._computed:
            self._computed[name] = compute()
        result: T = self._computed[name]
        return result
