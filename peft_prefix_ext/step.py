"""The state of one forward pass with a prefix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from peft_prefix_ext.checkpoint import LayerKV
from peft_prefix_ext.dropout import PrefixDropout
from peft_prefix_ext.mask import prepend_prefix
from peft_prefix_ext.rows import Rows

# The attribute of a forward pass' positions that holds its `Step`.
STEP = "_prefix_ext_step"


@dataclass
class Step:
    """One forward pass of the decoder with a prefix.

    Args:
        rows: The prefixes of the batch.
        positions: The positions of the new tokens, `[b or 1, q]`, counted from the first virtual token.
        states: What the reparameterization of each adapter depends on, see `memo.py`.
        residuals: What it adds to the K/V, by adapter and attention module; empty without one.
        dropout: Of the prefix, in training.
        projected: The leaf that the residuals are part of and the reparameterization's output that awaits its gradient,
            under reentrant gradient checkpointing only.
        running: Whether the forward pass is under way.
    """

    rows: Rows
    positions: torch.Tensor
    states: dict[str, Any]
    residuals: dict[str, dict[str, LayerKV]] = field(default_factory=dict)
    dropout: PrefixDropout | None = None
    projected: tuple[torch.Tensor, torch.Tensor] | None = None
    running: bool = True
    _masks: list[tuple[torch.Tensor | None, int | None, torch.Tensor | None]] = field(default_factory=list)

    @property
    def is_decoding(self) -> bool:
        """Whether a single token is under way."""
        return self.positions.shape[-1] == 1

    def mask(self, mask: torch.Tensor | None, kv_length: int, sliding_window: int | None) -> torch.Tensor | None:
        """Returns `prepend_prefix(...)`, computed once for all layers that were given the same mask."""
        for given, window, extended in self._masks:
            if given is mask and window == sliding_window:
                return extended
        extended = prepend_prefix(
            mask, self.rows.num_virtual_tokens, self.positions, kv_length, sliding_window, self.rows.lengths
        )
        self._masks.append((mask, sliding_window, extended))
        return extended
