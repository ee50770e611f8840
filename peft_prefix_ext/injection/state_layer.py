"""`PrefixStateLayer`: the states that one recurrent layer starts from, and the hooks that put them into its arguments."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn

from peft_prefix_ext.base_model.cache_argument import cache_argument
from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.base_model.states import ProbedState, map_states
from peft_prefix_ext.checkpoint.format import LayerState
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook
from peft_prefix_ext.injection.dropout import PrefixDropout
from peft_prefix_ext.injection.forward_context import PrefixForwardContext
from peft_prefix_ext.injection.mixer_call import MixerCall
from peft_prefix_ext.injection.prefix_tensors import PrefixTensors
from peft_prefix_ext.injection.sequences import (
    SequenceRows,
    grouped_rows,
    has_padding_before,
    packed_rows,
    rolled_rows,
)
from peft_prefix_ext.injection.state_view import PrefixStateView
from peft_prefix_ext.injection.tuner_layer import PrefixWeightsLayer

# Beside an MLP a state is this many times its parameter, so that the learning rate of the MLP, about a tenth of what flat
# parameters want, fits it too. A power of two, so that it starts exactly at the initial state. An MLP of their own did not
# pay: 80 steps at 2e-3 brought the loss of a tiny Qwen3-Next to 0.486 so, 0.496 with an MLP and 0.495 without the factor,
# and 0.529 without states.
GAIN = 8.0


class PrefixStateLayer(PrefixWeightsLayer):
    """A child of a mixer that acts in a hook before its forward, so that base parameters keep their names.

    The mixer starts from the states in its first pass only; then those in the model's cache go on by themselves. Where
    tokens have padding on their left or are packed, the mixer reads them row by row, see `sequences.py`: the hook before
    its forward gives it the first rows, and one behind it runs the others and puts the outputs together.

    States train without an MLP. `num_frozen_tokens` does not concern them: they have no tokens.

    Args:
        mixer: The mixer.
        parent: The module that calls it. Its positions, which the mixer does not get, tell forward passes apart.
        probed: What the probe found of the mixer.
        decoder_hook: The hook on the decoder, which all layers share.
    """

    def __init__(
        self, mixer: nn.Module, parent: nn.Module, probed: ProbedState, decoder_hook: PrefixDecoderHook
    ) -> None:
        tensors = [tensor for _, _, tensor in probed.states.numbered()]
        super().__init__(tensors[0].device, probed.module, probed.index, decoder_hook)
        self.states = [(kind, number) for kind, number, _ in probed.states.numbered()]
        self.dtypes = [tensor.dtype for tensor in tensors]
        self.adapter_layer_names = tuple(f"prefix_ext_{kind}_state_{number}" for kind, number in self.states)
        for name in self.adapter_layer_names:
            setattr(self, name, PrefixTensors(mixer))
        self.gains: dict[str, float] = {}
        self._parameter_names, self._cache_argument = mixer_arguments(mixer)
        self._parent_positions = _ParentPositions()
        self._handles = [
            parent.register_forward_pre_hook(self._before_parent, with_kwargs=True),
            mixer.register_forward_pre_hook(self._before_mixer, with_kwargs=True),
            mixer.register_forward_hook(self._after_mixer, with_kwargs=True),
        ]
        decoder_hook.has_states = True

    def detach(self) -> None:
        """Removes the hooks from the mixer and from the module that calls it."""
        for handle in self._handles:
            handle.remove()

    def update_layer(self, adapter_name: str, initial: LayerState, config: PrefixExtConfig) -> None:
        """Adds an adapter that starts at `initial`.

        Args:
            adapter_name: The name of the adapter.
            initial: Its initial states, without a batch dimension.
            config: Its config.
        """
        trains = config.trains(self.index)
        has_gain = trains and config.reparam == "mlp" and not config.inference_mode
        self.gains[adapter_name] = GAIN if has_gain else 1.0
        for kind, number, tensor in initial.numbered():
            start = tensor / self.gains[adapter_name]
            if trains:
                self.state(kind, number)[adapter_name] = nn.Parameter(start)
            else:
                self.state(kind, number).register_frozen(adapter_name, start)
        if not trains:
            self.frozen_peft_weight_names[adapter_name] = self.adapter_layer_names

    def state(self, kind: str, number: int) -> PrefixTensors:
        """Returns the parameters of one state by adapter; times `gains` they are the state."""
        tensors: PrefixTensors = getattr(self, f"prefix_ext_{kind}_state_{number}")
        return tensors

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether an adapter has states for this layer."""
        return adapter_name in self.gains

    def has_reparam(self, adapter_name: str) -> bool:
        return self.gains[adapter_name] != 1.0

    def drop_adapter(self, adapter_name: str) -> None:
        super().drop_adapter(adapter_name)
        self.gains.pop(adapter_name, None)

    def materialize(self, adapter_name: str, dropout: PrefixDropout | None = None) -> LayerState:
        """Returns the states of an adapter, without a batch dimension, in the dtypes of the model's cache.

        Args:
            adapter_name: The name of the adapter.
            dropout: The dropout of states that train, or `None`.
        """
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
        self._parent_positions.position_ids = kwargs.get("position_ids")

    def _before_mixer(self, mixer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        arguments = {**dict(zip(self._parameter_names, args, strict=False)), **kwargs}
        context = self.decoder_hook.find_context(self._parent_positions.position_ids)
        if context is None or not any(map(self.has_adapter, context.batch.adapters)):
            return None
        cache: Any = arguments.get(self._cache_argument)
        has_past = cache is not None and cache.has_previous_state(self.index)
        layout = self._layout(context, arguments, has_past)
        if has_past and layout is None:
            return None
        input_name = self._parameter_names[0]
        start = self._cached_states(cache) if has_past else self._batch_states(context, len(arguments[input_name]))
        call = MixerCall(arguments, input_name, self._cache_argument, self.index, start, layout)
        arguments = call.next_arguments()
        arguments[self._cache_argument].call = self, call
        return (), arguments

    def _after_mixer(self, mixer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        view = kwargs.get(self._cache_argument)
        # The test of an attention function adds another layer to the mixer for a while.
        if not isinstance(view, PrefixStateView) or view.call is None or view.call[0] is not self:
            return None
        (_, call), view.call = view.call, None  # or the two would keep each other alive
        return call.finish(mixer.forward, output)

    def _layout(
        self, context: PrefixForwardContext, arguments: dict[str, Any], has_past: bool
    ) -> list[SequenceRows] | None:
        """Returns the rows that the mixer runs; `None` to run the batch as it is."""
        has_cache = arguments.get(self._cache_argument) is not None
        mask = arguments.get("attention_mask")
        if context.sequences is not None:
            if has_cache:
                raise ValueError("Packed sequences need `use_cache=False` where layers are recurrent.")
            sequences = context.sequences.expand(len(arguments[self._parameter_names[0]]), -1)
            return context.compute_once("packed rows", lambda: packed_rows(sequences))
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return None
        # The first chunks of a prefill may be padding alone, so that tokens begin in a later one.
        if has_past and not context.compute_once("has padding before", lambda: has_padding_before(mask)):
            return None
        return context.compute_once("rows", lambda: grouped_rows(mask) if has_cache else rolled_rows(mask))

    def _batch_states(self, context: PrefixForwardContext, batch_size: int) -> LayerState:
        """Returns the states that the rows of the batch start from, `[b, ...]` each."""
        batch = context.batch
        if batch.adapter_indices is None:
            states = self.materialize(batch.adapters[0], context.dropout)
            return map_states(states, lambda tensor: tensor.expand(batch_size, *tensor.shape))
        known = {name: self.materialize(name, context.dropout) for name in batch.adapters if self.has_adapter(name)}
        # Rows without a prefix, or with one that has no states, start as the base model does.
        zeros = map_states(next(iter(known.values())), torch.zeros_like)
        by_adapter = [*(known.get(name, zeros) for name in batch.adapters), zeros]
        indices = batch.adapter_indices
        return LayerState(
            *(
                tuple(torch.stack(tensors)[indices.to(tensors[0].device)] for tensors in zip(*kind, strict=True))
                for kind in zip(*by_adapter, strict=True)
            )
        )

    def _cached_states(self, cache: Any) -> LayerState:
        layer = cache.layers[self.index]
        convs = tuple(layer.conv_states[number][..., 1:] for kind, number in self.states if kind == "conv")
        recurrent = tuple(layer.recurrent_states[number] for kind, number in self.states if kind == "recurrent")
        return LayerState(convs, recurrent)


class _ParentPositions(threading.local):
    """The positions that the module which calls a mixer got last, for each thread."""

    position_ids: torch.Tensor | None = None

    def __reduce__(self) -> tuple[type[_ParentPositions], tuple[()]]:
        return _ParentPositions, ()  # a copy of the model has run nothing yet


def mixer_arguments(mixer: nn.Module) -> tuple[list[str], str]:
    """Returns the parameters of a mixer's forward, of which the first is its input, and the name of its cache.

    Raises:
        ValueError: If it takes no cache.
    """
    cache_name = cache_argument(mixer)
    if cache_name is None:
        raise ValueError(
            f"{describe(mixer)} takes no cache, so its states cannot be trained: use `state_prefix=False`."
        )
    return list(inspect.signature(mixer.forward).parameters), cache_name
