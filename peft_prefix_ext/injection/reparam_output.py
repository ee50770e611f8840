"""The output of a reparameterization in one forward pass: evaluated, memoized for decoding, or detached."""

from __future__ import annotations

from typing import Any

import torch

from peft_prefix_ext.checkpoint.format import LayerKV
from peft_prefix_ext.injection.decode_memo import memoize_for_decoding
from peft_prefix_ext.injection.reparam import PrefixMLP


def reparam_state(mlp: PrefixMLP) -> Any:
    """Returns what the output of `mlp` depends on, to compare with `==`.

    The version of a parameter changes with every in-place write, such as by an optimizer or `load_state_dict`.
    """
    if torch.compiler.is_compiling():  # a compiled graph cannot read versions
        return None
    parameters = list(mlp.parameters())
    return torch.is_autocast_enabled(parameters[0].device.type), [parameter._version for parameter in parameters]


def reparam_output(
    mlp: PrefixMLP, adapter_name: str, state: Any, *, cache: Any, is_decoding: bool, is_reentrant: bool
) -> tuple[list[LayerKV], tuple[torch.Tensor, torch.Tensor] | None]:
    """Returns the K/V of each layer that trains, and what `PrefixForwardContext.projected` describes.

    Args:
        mlp: The reparameterization.
        adapter_name: Its adapter.
        state: What `reparam_state` returned.
        cache: The cache of the forward pass, or `None`.
        is_decoding: Whether there is one new token.
        is_reentrant: Whether the layers run under reentrant gradient checkpointing.
    """
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in mlp.parameters()):
        if is_reentrant:
            return _detached_output(mlp)
        return _split(mlp), None
    if mlp.training or torch.compiler.is_compiling():
        return _split(mlp), None
    with torch.no_grad():
        return memoize_for_decoding(cache, adapter_name, state, is_decoding, lambda: _split(mlp)), None


def _split(mlp: PrefixMLP) -> list[LayerKV]:
    output: list[LayerKV] = mlp()
    return output


@torch.compiler.disable  # a compiled graph cannot run its backward pass layer by layer
def _detached_output(mlp: PrefixMLP) -> tuple[list[LayerKV], tuple[torch.Tensor, torch.Tensor]]:
    projected = mlp(is_split=False)
    leaf = projected.detach().requires_grad_()
    return mlp.split(leaf), (leaf, projected)
