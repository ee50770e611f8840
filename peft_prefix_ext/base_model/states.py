"""The states of a recurrent layer: what it keeps of the text so far, as transformers' caches hold it.

A convolution keeps its last inputs. transformers caches `kernel_size` columns of them, the first of which no later token
reads; a prefix has the others. A recurrence keeps one tensor, whose layout is that of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from peft_prefix_ext.checkpoint.format import LayerState


@dataclass(frozen=True)
class ProbedState:
    """One recurrent layer, as the probe found it.

    Args:
        module: The name of its mixer in the model.
        index: Its layer index in the cache. In some hybrids an attention layer has the same one.
        states: Its states after the tokens of the probe.
    """

    module: str
    index: int
    states: LayerState


def states_of(layer: Any) -> LayerState:
    """Returns the states that a layer of a transformers cache holds for its first row."""
    convs = [state for _, state in sorted(layer.conv_states.items()) if state is not None]
    recurrent = [state for _, state in sorted(layer.recurrent_states.items()) if state is not None]
    return LayerState(tuple(state[0, :, 1:].clone() for state in convs), tuple(state[0].clone() for state in recurrent))


def map_states(states: LayerState, function: Callable[[torch.Tensor], torch.Tensor]) -> LayerState:
    """Returns `function` of each state."""
    return LayerState(*(tuple(function(tensor) for tensor in kind) for kind in states))
