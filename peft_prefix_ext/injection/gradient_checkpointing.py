"""Gradient checkpointing: which forward pass a layer repeats, and how the reparameterization gets its gradient.

Under reentrant checkpointing every layer runs a backward pass of its own. It would go on through the layer's K/V into
the MLP, whose graph is freed after the first layer. So the layers get K/V from a detached leaf. Its gradient is complete
when the backward pass reaches the embeddings, and is passed on to the MLP there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from peft_prefix_ext.injection.forward_context import PrefixForwardContext


@dataclass
class CheckpointReplay:
    """The forward pass that layers may repeat, of a model that does not pass positions down to its layers.

    Args:
        context: The last forward pass.
        is_ambiguous: Whether the one before it was not repeated, so that a layer may belong to either.
        was_repeated: Whether a layer has repeated it.
    """

    context: PrefixForwardContext
    is_ambiguous: bool = False
    was_repeated: bool = False

    @classmethod
    def after(cls, previous: CheckpointReplay | None, context: PrefixForwardContext) -> CheckpointReplay:
        """Returns the replay of `context`, a forward pass that follows that of `previous`."""
        return cls(context, is_ambiguous=previous is not None and not previous.was_repeated)

    def replayed_context(self) -> PrefixForwardContext:
        """Returns the forward pass that a layer repeats.

        Raises:
            RuntimeError: If it may be either of two.
        """
        if self.is_ambiguous:
            raise RuntimeError(
                "Under gradient checkpointing this model needs a backward pass after each forward pass with a prefix."
            )
        self.was_repeated = True
        return self.context


def uses_checkpointing(decoder: nn.Module) -> bool:
    """Whether the model trains under gradient checkpointing of either kind."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def uses_reentrant_checkpointing(decoder: nn.Module) -> bool:
    """Whether the model trains under reentrant checkpointing, which is torch's default."""
    for module in decoder.modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, functools.partial):
                return _is_reentrant(function)
    return False


# Of each function that a model checkpoints its layers with, whether it is reentrant.
_KNOWN: WeakKeyDictionary[functools.partial, bool] = WeakKeyDictionary()


def _is_reentrant(function: functools.partial) -> bool:
    """Tries it: ms-swift puts a function of its own in the place of torch's, which has other ideas than its keywords."""
    if torch.compiler.is_compiling():
        return function.keywords.get("use_reentrant") is not False
    if function not in _KNOWN:
        with torch.enable_grad():
            tried = function(torch.clone, torch.zeros(1, requires_grad=True))
        _KNOWN[function] = type(tried.grad_fn).__name__ == "CheckpointFunctionBackward"
    return _KNOWN[function]


def require_gradient(embeddings: torch.Tensor, context: PrefixForwardContext) -> torch.Tensor:
    """Returns embeddings that require a gradient: reentrant checkpointing drops gradients if no input requires one."""
    if context.projected is not None:
        return pass_gradient(embeddings, *context.projected)
    return embeddings if embeddings.requires_grad else embeddings.detach().requires_grad_()


@torch.compiler.disable  # a compiled graph cannot pass on the gradient of a leaf outside of it
def pass_gradient(hidden_states: torch.Tensor, leaf: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Returns `hidden_states` unchanged; in the backward pass `source` receives the gradient accumulated in `leaf`."""
    return _PassGradient.apply(hidden_states, source, leaf)


class _PassGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, source: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        ctx.leaf = leaf
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        accumulated, ctx.leaf.grad = ctx.leaf.grad, None
        return gradient, accumulated, None
