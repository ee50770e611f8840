"""Where a trained state lies in vLLM's cache: which part of it a rank holds, and in which order.

A checkpoint has the layout of transformers' cache (`peft_prefix_ext/checkpoint/format.py`). Each class of vLLM has one of
its own. What is written here mirrors the class's `get_state_shape` and the weight loader of its convolution, and is tested
token by token. A class that is not listed keeps states that nobody has verified: it is only ever set to zero.

Both keep the inputs of the convolution oldest first. With speculative decoding vLLM's cache has more columns behind them,
which a prompt does not read. All channels of a convolution are one tensor of several sections, and every rank holds its
part of each section.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.platforms import current_platform

from peft_prefix_ext.checkpoint.compatibility import StateShape
from peft_prefix_ext.checkpoint.format import LayerState


@dataclass(frozen=True, slots=True)
class StateLayout:
    """The states of one recurrent layer in the whole model.

    Args:
        sections: Channels of each section of the convolution.
        kernel_size: Width of the convolution.
        recurrent: Shape of the recurrent state as transformers has it, heads first; empty if there is none.
        replicated: Which sections every rank holds whole; none if empty.
        swaps: Whether vLLM has the last two dimensions of the recurrent state in the other order.
    """

    sections: tuple[int, ...]
    kernel_size: int
    recurrent: tuple[int, ...] = ()
    replicated: tuple[bool, ...] = ()
    swaps: bool = False

    def shapes(self, layer: int) -> list[StateShape]:
        """Returns the shapes of the states as a checkpoint has them, of the layer with this index."""
        shapes = [StateShape(layer, "conv", 0, (sum(self.sections), self.kernel_size - 1))]
        return [*shapes, StateShape(layer, "recurrent", 0, self.recurrent)] if self.recurrent else shapes


def layout_of(module: Any) -> StateLayout | None:
    """Returns the layout of a recurrent layer of vLLM; None if it was never verified."""
    classes = {each.__name__ for each in type(module).__mro__}
    if "ShortConv" in classes:
        return StateLayout((module.conv_dim,), module.L_cache)
    if "QwenGatedDeltaNetAttention" in classes:
        return StateLayout(
            (module.key_dim, module.key_dim, module.value_dim),
            module.conv_kernel_size,
            (module.num_v_heads, module.head_k_dim, module.head_v_dim),
            # Its shape is [heads, v, k]. The kernels for CPUs take the same memory for [heads, k, v].
            swaps=not current_platform.is_cpu(),
        )
    if "MambaMixer2" in classes:
        # `module.n_groups` counts the copies of a single group, of which every rank has one.
        n_groups = module.norm.n_groups
        copies = n_groups % module.tp_size != 0
        group_channels = n_groups * module.ssm_state_size
        return StateLayout(
            (module.intermediate_size, group_channels, group_channels),
            module.conv_kernel_size,
            (module.num_heads, module.head_dim, module.ssm_state_size),
            replicated=(False, copies, copies),
        )
    return None


def part_of_rank(
    state: LayerState,
    layout: StateLayout,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    tp_rank: int,
    tp_size: int,
) -> tuple[torch.Tensor, ...]:
    """Returns a state as one block of one tensor-parallel rank holds it.

    Args:
        state: The state of the whole layer, of the layout's shapes.
        layout: The layout of the layer.
        shapes: The shapes of the rank's cache tensors, without the dimension of the blocks.
        dtypes: Their dtypes.
        tp_rank: Tensor-parallel rank.
        tp_size: Number of tensor-parallel ranks.
    """
    replicated = layout.replicated or (False,) * len(layout.sections)
    channels = torch.cat(
        [
            section if whole else section.chunk(tp_size)[tp_rank]
            for section, whole in zip(state.conv[0].split(layout.sections), replicated, strict=True)
        ]
    )
    conv = torch.zeros(shapes[0], dtype=dtypes[0])
    by_channel = conv if is_conv_state_dim_first() else conv.T
    by_channel[:, : layout.kernel_size - 1] = channels
    if not layout.recurrent:
        return (conv,)
    heads = state.recurrent[0].chunk(tp_size)[tp_rank]
    heads = heads.transpose(-1, -2) if layout.swaps else heads
    return conv, heads.to(dtypes[1]).reshape(shapes[1])
