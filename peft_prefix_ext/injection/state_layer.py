"""`PrefixStateLayer`: the states that one recurrent layer starts from, and the hooks that put them into its arguments."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache

from peft_prefix_ext.base_model.cache_argument import cache_argument
from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.base_model.states import ProbedState
from peft_prefix_ext.checkpoint.format import LayerState
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook
from peft_prefix_ext.injection.dropout import PrefixDropout
from peft_prefix_ext.injection.forward_context import PrefixForwardContext
from peft_prefix_ext.injection.prefix_tensors import PrefixTensors
from peft_prefix_ext.injection.sequences import (
    PACKING_ARGUMENTS,
    SequenceRows,
    count_padding,
    grouped_rows,
    packed_rows,
    put_back,
    rolled_rows,
)
from peft_prefix_ext.injection.state_view import PrefixStateView
from peft_prefix_ext.injection.tuner_layer import PrefixWeightsLayer

# Beside an MLP a state is this many times its parameter, so that the learning rate of the MLP, about a tenth of what flat
# parameters want, fits it too. A power of two, so that the state that it starts from is exact.
GAIN = 8.0


class PrefixStateLayer(PrefixWeightsLayer):
    """A child of a mixer: the states are replaced in a hook before its forward, and the cache is written in one behind it.

    The mixer reads them in its first pass only; from then on the states in the model's cache go on by themselves. Where
    tokens have padding on their left or are packed, the mixer reads them row by row, see `sequences.py`: the hook in front
    replaces its arguments by those of the first rows, and the hook behind runs the others and puts all outputs together.

    Args:
        mixer: The mixer.
        parent: The module that calls it, whose positions tell forward passes apart.
        probed: What the probe found of it.
        decoder_hook: The hook on the decoder, which all layers share.
    """

    def __init__(
        self, mixer: nn.Module, parent: nn.Module, probed: ProbedState, decoder_hook: PrefixDecoderHook
    ) -> None:
        super().__init__(next(probed.states.numbered())[2].device, probed.module, probed.index, decoder_hook)
        decoder_hook.has_states = True
        self.states = [(kind, number) for kind, number, _ in probed.states.numbered()]
        self.dtypes = [tensor.dtype for _, _, tensor in probed.states.numbered()]
        self.adapter_layer_names = tuple(state_name(kind, number) for kind, number in self.states)
        for name in self.adapter_layer_names:
            setattr(self, name, PrefixTensors(mixer))
        self.gains: dict[str, float] = {}
        self._parameter_names, self._cache_argument = mixer_arguments(mixer)
        self._positions = _LayerPositions()
        self._handles = [
            parent.register_forward_pre_hook(self._before_parent, with_kwargs=True),
            mixer.register_forward_pre_hook(self._before_mixer, with_kwargs=True),
            mixer.register_forward_hook(self._after_mixer, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def update_layer(self, adapter_name: str, initial: LayerState, config: PrefixExtConfig) -> None:
        """Adds an adapter that starts at `initial`.

        Args:
            adapter_name: The name of the adapter.
            initial: Its initial states, as the probe gives them.
            config: Its config.
        """
        trains = config.trains(self.index)
        self.gains[adapter_name] = GAIN if trains and config.reparam == "mlp" and not config.inference_mode else 1.0
        for kind, number, tensor in initial.numbered():
            container: PrefixTensors = getattr(self, state_name(kind, number))
            start = tensor / self.gains[adapter_name]
            if trains:
                container[adapter_name] = nn.Parameter(start)
            else:
                container.register_frozen(adapter_name, start)
        if not trains:
            self.frozen_peft_weight_names[adapter_name] = self.adapter_layer_names

    def has_reparam(self, adapter_name: str) -> bool:
        return self.gains[adapter_name] != 1.0

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether an adapter has states for this layer."""
        return adapter_name in self.gains

    def drop_adapter(self, adapter_name: str) -> None:
        super().drop_adapter(adapter_name)
        self.gains.pop(adapter_name, None)

    def materialize(self, adapter_name: str, dropout: PrefixDropout | None = None) -> LayerState:
        """Returns the states of an adapter without a batch dimension, in the dtypes that the model caches them in."""
        trains = adapter_name not in self.frozen_peft_weight_names
        materialized: dict[str, list[torch.Tensor]] = {kind: [] for kind in LayerState._fields}
        for name, (kind, _), dtype in zip(self.adapter_layer_names, self.states, self.dtypes, strict=True):
            tensor = getattr(self, name)[adapter_name]
            self.check_loaded(adapter_name, tensor)
            tensor = tensor * self.gains[adapter_name]
            if dropout is not None and trains:
                tensor = dropout(tensor, f"{self.module_name}.{name}")
            materialized[kind].append(tensor.to(dtype))
        return LayerState(*(tuple(tensors) for tensors in materialized.values()))

    def _before_parent(self, parent: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._positions.position_ids = kwargs.get("position_ids")

    def _before_mixer(self, mixer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        context = self.decoder_hook.find_context(self._positions.position_ids)
        if context is None or not any(self.has_adapter(name) for name in context.batch.adapters):
            return None
        arguments = {**dict(zip(self._parameter_names, args, strict=False)), **kwargs}
        call = self._plan(context, arguments)
        if call is None:
            return None
        return (), self._rows_of(call, 0)

    def _plan(self, context: PrefixForwardContext, arguments: dict[str, Any]) -> _MixerCall | None:
        """Returns how the mixer runs; `None` if it runs as it is called."""
        cache: Cache | None = arguments.get(self._cache_argument)
        has_past = cache is not None and cache.has_previous_state(self.index)
        mask = arguments.get("attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        if has_past and (mask is None or torch.compiler.is_compiling()):
            return None
        batch_size = len(arguments[self._parameter_names[0]])
        layout = None
        if context.sequences is not None:
            if cache is not None:
                raise ValueError("Packed sequences before recurrent layers need `use_cache=False`.")
            sequences = context.sequences.expand(batch_size, -1)
            layout = context.compute_once("packed rows", lambda: packed_rows(sequences))
        elif mask is not None:
            if has_past and not context.compute_once("late start", lambda: bool(count_padding(mask).any())):
                return None
            rows_of = rolled_rows if cache is None else grouped_rows
            layout = context.compute_once("rows", lambda: rows_of(mask))
        start = self._past_states(cache) if has_past else self._start_states(context, batch_size)
        return _MixerCall(arguments, cache, layout, start)

    def _start_states(self, context: PrefixForwardContext, batch_size: int) -> LayerState:
        """Returns the states that each row of the batch starts from, `[b, ...]` each."""
        batch = context.batch
        if batch.adapter_indices is None:
            states = self.materialize(batch.adapters[0], context.dropout)
            return _map_states(states, lambda tensor: tensor.expand(batch_size, *tensor.shape))
        by_adapter = [
            self.materialize(name, context.dropout) if self.has_adapter(name) else None for name in batch.adapters
        ]
        like = next(states for states in by_adapter if states is not None)
        # Rows without a prefix, or with one that has no states, start as the base model does.
        zeros = _map_states(like, torch.zeros_like)
        stacks = zip(*([*kind] for kind in zip(*(states or zeros for states in [*by_adapter, None]), strict=True)))
        del stacks
        rows = [states or zeros for states in [*by_adapter, None]]
        indices = batch.adapter_indices
        return LayerState(
            *(
                tuple(torch.stack(tensors)[indices.to(tensors[0].device)] for tensors in zip(*kind, strict=True))
                for kind in zip(*rows, strict=True)
            )
        )

    def _past_states(self, cache: Any) -> LayerState:
        layer = cache.layers[self.index]
        states: dict[str, list[torch.Tensor]] = {kind: [] for kind in LayerState._fields}
        for kind, number in self.states:
            tensor = getattr(layer, f"{kind}_states")[number]
            states[kind].append(tensor[..., 1:] if kind == "conv" else tensor)
        return LayerState(*(tuple(tensors) for tensors in states.values()))

    def _rows_of(self, call: _MixerCall, number: int) -> dict[str, Any]:
        """Returns the arguments of the mixer for the rows `number` of a call."""
        arguments = dict(call.arguments)
        hidden = arguments[self._parameter_names[0]]
        if call.layout is None:
            states = call.start
        else:
            layout = call.layout[number]
            states = _map_states(call.start, lambda tensor: tensor[layout.rows.to(tensor.device)])
            for name in (self._parameter_names[0], "attention_mask"):
                if isinstance(arguments.get(name), torch.Tensor):
                    arguments[name] = layout.take(arguments[name])
            arguments = {name: value for name, value in arguments.items() if name not in PACKING_ARGUMENTS}
        # A mixer may write in place, so it gets copies.
        states = _map_states(states, lambda tensor: tensor.to(hidden.device, copy=True))
        view = PrefixStateView(call.cache, self.index, states)
        call.views.append(view)
        view.call = call
        arguments[self._cache_argument] = view
        return arguments

    def _after_mixer(self, mixer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        view = kwargs.get(self._cache_argument)
        if not isinstance(view, PrefixStateView):
            return None
        call: _MixerCall = view.call
        if call.layout is not None:
            outputs = [output]
            outputs += [mixer.forward(**self._rows_of(call, number)) for number in range(1, len(call.layout))]
            batch_size, num_new = call.arguments[self._parameter_names[0]].shape[:2]
            output = put_back(outputs, call.layout, batch_size, num_new)
        if call.cache is not None:
            self._write(call)
        return output

    def _write(self, call: _MixerCall) -> None:
        """Writes the last states of all rows into the model's cache, which goes on from there."""
        cache: Any = call.cache
        for kind, number in self.states:
            parts = []
            for position, view in enumerate(call.views):
                part = getattr(view, f"{kind}_states")[number]
                if call.layout is not None and call.layout[position].is_empty:
                    part = getattr(call.start, kind)[number][call.layout[position].rows]
                parts.append(part)
            if kind == "conv":
                size = max(part.shape[-1] for part in parts)
                parts = [nn.functional.pad(part, (size - part.shape[-1], 0)) for part in parts]
            full = torch.cat(parts)
            if call.layout is not None:
                full = full[torch.cat([rows.rows for rows in call.layout]).argsort()]
            if kind == "conv":
                kernel_size = call.views[0].kernel_sizes[number]
                cache.update_conv_state(full, self.index, state_idx=number, conv_kernel_size=kernel_size)
            else:
                cache.update_recurrent_state(full, self.index, state_idx=number)


class _LayerPositions(threading.local):
    """The positions that the calling module of a mixer got, for each thread."""

    position_ids: torch.Tensor | None = None

    def __reduce__(self) -> tuple[type[_LayerPositions], tuple[()]]:
        return _LayerPositions, ()
