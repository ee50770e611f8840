"""`BatchAdapters`: which prefix each row of a batch sees, all the same one or each its own (PEFT's `adapter_names`).

Shapes: b batch, n adapters in the batch, p virtual tokens (of the longest prefix in the batch).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from peft_prefix_ext.checkpoint.format import LayerKV

# PEFT's name, in `adapter_names`, for a row without an adapter.
BASE_ADAPTER = "__base__"


@dataclass(frozen=True)
class BatchAdapters:
    """The prefixes of one batch.

    A prefix shorter than the longest one is padded on the right with columns that its rows never see. The positions of a
    row start behind its own prefix.

    Args:
        adapters: The adapters in use, each once.
        num_virtual_tokens: p.
        adapter_indices: The index in `adapters` for each row, `[b]`, n for no prefix; `None` if all rows have the one
            adapter.
        lengths: How many virtual tokens each row sees, `[b, 1]`; `None` as above.
        expand_size: How many consecutive rows of a batch come from each of these, as in a beam search.
        lengths_by_row: `lengths` as numbers, which need not be read back from a device; empty if all rows have the one
            adapter.
        names: The `adapter_names`, one for each row; empty as above.
    """

    adapters: tuple[str, ...]
    num_virtual_tokens: int
    adapter_indices: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    expand_size: int = 1
    lengths_by_row: tuple[int, ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def from_adapter_names(
        cls, names: Sequence[str], num_virtual_tokens: Mapping[str, int], device: torch.device, expand_size: int
    ) -> BatchAdapters:
        """Gives row i the prefix `names[i]`, and none where that is `"__base__"`.

        Args:
            names: The `adapter_names`, `[b]`.
            num_virtual_tokens: How many virtual tokens each adapter has.
            device: The device of the batch.
            expand_size: As for the class.
        """
        adapters = tuple(sorted(set(names) - {BASE_ADAPTER}))
        adapter_indices = [len(adapters) if name == BASE_ADAPTER else adapters.index(name) for name in names]
        lengths = [0 if name == BASE_ADAPTER else num_virtual_tokens[name] for name in names]
        return cls(
            adapters,
            max((num_virtual_tokens[name] for name in adapters), default=0),
            torch.tensor(adapter_indices, device=device),
            torch.tensor(lengths, device=device)[:, None],
            expand_size,
            tuple(lengths),
            tuple(names),
        )

    @property
    def shift(self) -> int | torch.Tensor:
        """The position of the first real token: one number, or `[b, 1]`."""
        return self.num_virtual_tokens if self.lengths is None else self.lengths

    def expand_to(self, batch_size: int) -> BatchAdapters:
        """Returns the prefixes of a batch of `batch_size` rows.

        Raises:
            ValueError: If these are of another number of inputs.
        """
        if self.adapter_indices is None or self.lengths is None or batch_size == len(self.adapter_indices):
            return self
        if batch_size != len(self.adapter_indices) * self.expand_size:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.adapter_indices)} and {batch_size} respectively."
            )
        return replace(
            self,
            adapter_indices=self.adapter_indices.repeat_interleave(self.expand_size, dim=0),
            lengths=self.lengths.repeat_interleave(self.expand_size, dim=0),
            expand_size=1,
            lengths_by_row=tuple(length for length in self.lengths_by_row for _ in range(self.expand_size)),
            names=tuple(name for name in self.names for _ in range(self.expand_size)),
        )

    def offsets(self, batch_size: int) -> tuple[int, ...]:
        """Returns how many virtual tokens precede each row of a batch of `batch_size`."""
        return self.lengths_by_row or (self.num_virtual_tokens,) * batch_size

    def stack(self, prefixes: list[LayerKV]) -> LayerKV:
        """Returns the K/V of all `adapters` in one tensor each, `[n + 1, num_kv_heads, p, head_dim]`, the last of zeros.

        If all rows have the same adapter, returns its K/V as they are, `[num_kv_heads, p, head_dim]` each.
        """
        if self.adapter_indices is None:
            return prefixes[0]
        padded = [
            [functional.pad(tensor, (0, 0, 0, self.num_virtual_tokens - tensor.shape[1])) for tensor in kind]
            for kind in zip(*prefixes, strict=True)
        ]
        return LayerKV(*(torch.stack([*kind, torch.zeros_like(kind[0])]) for kind in padded))

    def select_rows(self, stacked: LayerKV) -> LayerKV:
        """Returns the K/V that each row sees, out of those of `stack`, `[b, num_kv_heads, p, head_dim]` each.

        Without a batch dimension if all rows have the same adapter.
        """
        if self.adapter_indices is None:
            return stacked
        return LayerKV(*(tensor[self.adapter_indices.to(tensor.device)] for tensor in stacked))
