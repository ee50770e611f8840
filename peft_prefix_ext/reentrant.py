"""Lets one evaluation of the reparameterization serve all layers under reentrant gradient checkpointing.

There every layer runs a backward pass of its own, on through the K/V it captured and into the MLP, whose graph is gone
after the first layer. So the layers are given a leaf instead, and its gradient, complete once the backward pass has
come down to the embeddings, is handed on to the MLP from there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn


def uses_checkpointing(decoder: nn.Module) -> bool:
    """Whether the model is training under gradient checkpointing of either kind."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def uses_reentrant_checkpointing(decoder: nn.Module) -> bool:
    """Whether the model is training under reentrant checkpointing, which is torch's default where it is not told."""
    for module in decoder.modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, functools.partial):
                return function.keywords.get("use_reentrant") is not False
    return False


@torch.compiler.disable  # the compiler knows no leaf that gathers a gradient outside of its graph
def gather_gradient(hidden_states: torch.Tensor, leaf: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Returns `hidden_states` unchanged; in the backward pass `source` receives the gradient that `leaf` gathered."""
    return _GatherGradient.apply(hidden_states, source, leaf)


class _GatherGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, source: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        ctx.leaf = leaf
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        gathered, ctx.leaf.grad = ctx.leaf.grad, None
        return gradient, gathered, None
