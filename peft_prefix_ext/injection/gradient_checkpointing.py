"""Gradient checkpointing: which forward pass a layer repeats, and how one evaluation of the reparameterization serves all.

Under the reentrant kind every layer runs a backward pass of its own, on through the K/V it captured and into the MLP, whose graph is gone
after the first layer. So the layers are given a leaf instead, and its gradient, complete once the backward pass has
come down to the embeddings, is handed on to the MLP from there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_prefix_ext.injection.forward_context import PrefixForwardContext


@dataclass
class CheckpointReplay:
    """The last forward pass that a backward pass may repeat, for models that do not hand positions down to their layers.

    Args:
        step: The forward pass.
        is_ambiguous: Whether the one before it has not been repeated, so that either may be meant.
        was_repeated: Whether it has been.
    """

    step: PrefixForwardContext
    is_ambiguous: bool = False
    was_repeated: bool = False

    @classmethod
    def of(cls, step: PrefixForwardContext, before: CheckpointReplay | None) -> CheckpointReplay:
        """Returns the replay of `step`, which follows the one of `before`."""
        return cls(step, is_ambiguous=before is not None and not before.was_repeated)

    def replayed_context(self) -> PrefixForwardContext:
        """Returns the forward pass that a layer repeats.

        Raises:
            RuntimeError: If it could be one of two.
        """
        if self.is_ambiguous:
            raise RuntimeError(
                "Under gradient checkpointing this model needs a backward pass after each forward pass with a prefix."
            )
        self.was_repeated = True
        return self.step


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


def require_gradient(embeddings: torch.Tensor, step: PrefixForwardContext) -> torch.Tensor:
    """Returns embeddings that require a gradient: reentrant checkpointing drops that of everything behind others."""
    if step.projected is not None:
        return gather_gradient(embeddings, *step.projected)
    return embeddings if embeddings.requires_grad else embeddings.detach().requires_grad_()


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
