"""`MixerCall`: one call of a mixer that starts from given states, run row by row where tokens have padding before them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import Cache

from peft_prefix_ext.base_model.states import map_states
from peft_prefix_ext.checkpoint.format import LayerState
from peft_prefix_ext.injection.sequences import PACKING_ARGUMENTS, SequenceRows, put_back
from peft_prefix_ext.injection.state_view import PrefixStateView


@dataclass
class MixerCall:
    """One call of a mixer.

    Args:
        arguments: Its arguments by name.
        input_name: The name of its input, `[b, q, hidden_size]`.
        cache_name: The name of its cache.
        index: Its layer index.
        start: The states that each row of the batch starts from, `[b, ...]` each.
        layout: The rows that it runs, those of each element at once; `None` to run the batch as it is.
        views: What it saw as its cache, for each element of `layout` that ran.
    """

    arguments: dict[str, Any]
    input_name: str
    cache_name: str
    index: int
    start: LayerState
    layout: list[SequenceRows] | None = None
    views: list[PrefixStateView] = field(default_factory=list)

    @property
    def cache(self) -> Cache | None:
        cache: Cache | None = self.arguments.get(self.cache_name)
        return cache

    def next_arguments(self) -> dict[str, Any]:
        """Returns the arguments of the mixer for the next rows."""
        hidden_states: torch.Tensor = self.arguments[self.input_name]
        arguments, states = dict(self.arguments), self.start
        if self.layout is not None:
            rows = self.layout[len(self.views)]
            states = map_states(states, lambda tensor: tensor[rows.rows.to(tensor.device)])
            for name in (self.input_name, "attention_mask"):
                if isinstance(arguments.get(name), torch.Tensor):
                    arguments[name] = rows.take(arguments[name])
            arguments = {name: value for name, value in arguments.items() if name not in PACKING_ARGUMENTS}
        # Copies, as a mixer that reads a single token writes them in place.
        states = map_states(states, lambda tensor: tensor.to(hidden_states.device, copy=True))
        arguments[self.cache_name] = view = PrefixStateView(self.cache, self.index, states)
        self.views.append(view)
        return arguments

    def finish(self, run: Callable[..., torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Returns the output for the whole batch, `[b, q, hidden_size]`, and writes the last states into the cache.

        Args:
            run: Runs the mixer.
            output: Its output for the first rows.
        """
        if self.layout is not None:
            outputs = [output]
            while len(self.views) < len(self.layout):
                outputs.append(run(**self.next_arguments()))
            output = put_back(outputs, self.layout, *self.arguments[self.input_name].shape[:2])
        if self.cache is not None:
            self._write(self.cache)
        return output

    def _write(self, cache: Cache) -> None:
        for kind, number, start in self.start.numbered():
            parts = [getattr(view, f"{kind}_states")[number] for view in self.views]
            if self.layout is not None:
                pairs = zip(parts, self.layout, strict=True)
                parts = [start[rows.rows.to(start.device)].to(part) if rows.is_empty else part for part, rows in pairs]
            if kind == "conv":
                # With all new tokens, which a cache that can be cropped keeps.
                width = max(part.shape[-1] for part in parts)
                parts = [functional.pad(part, (width - part.shape[-1], 0)) for part in parts]
            states = torch.cat(parts)
            if self.layout is not None:
                order = torch.cat([rows.rows for rows in self.layout]).argsort()
                states = states[order.to(states.device)]
            if kind == "conv":
                kernel_size = start.shape[-1] + 1
                cache.update_conv_state(states, self.index, state_idx=number, conv_kernel_size=kernel_size)
            else:
                cache.update_recurrent_state(states, self.index, state_idx=number)
