"""One warning if the learning rate is too low for a prefix.

Trainers' defaults are meant for weights: at the 5e-5 of `Trainer` or the 2e-5 of `SFTTrainer` a prefix learns next to
nothing, and nothing else would say so.
"""

from __future__ import annotations

import warnings
from math import inf
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook
from peft_prefix_ext.injection.state_layer import PrefixStateLayer
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer

# By `reparam`: a prefix without an MLP needs about ten times the learning rate of one with it.
RECOMMENDED = {"mlp": 2e-3, "none": 2e-2}
# If it is so many times higher than the rate, there is a warning.
TOO_LOW = 20


class _Watch:
    """A hook on the steps of all optimizers, until each model that it waits for has been trained or deleted."""

    def __init__(self) -> None:
        self._models: WeakSet[nn.Module] = WeakSet()
        self._seen: WeakSet[Optimizer] = WeakSet()
        self._handle: RemovableHandle | None = None

    def wait_for(self, model: nn.Module) -> None:
        self._models.add(model)
        self._seen.clear()
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or optimizer in self._seen:
            return
        self._seen.add(optimizer)
        for model in list(self._models):
            parameters = _trained(model)
            rates = {
                (has_mlp, _rate(group))
                for group in optimizer.param_groups
                for has_mlp in {parameters[id(each)] for each in group["params"] if id(each) in parameters}
            }
            if rates or not parameters:
                self._models.discard(model)
            if "adam" in type(optimizer).__name__.lower():  # other optimizers need other rates
                _check(rates)
        if not self._models and self._handle is not None:
            self._handle.remove()
            self._handle = None


def _trained(model: nn.Module) -> dict[int, bool]:
    """Maps the id of each trainable prefix parameter of `model` to whether it belongs to an MLP, or is scaled to fit one."""
    return {
        id(parameter): isinstance(module, PrefixDecoderHook)
        or (isinstance(module, PrefixStateLayer) and module.has_reparam(name.rpartition(".")[2]))
        for module in model.modules()
        if isinstance(module, PrefixTunerLayer)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def _rate(group: dict[str, Any]) -> float:
    """Returns the learning rate of a group without the warm-up of a scheduler."""
    rates = [group[name] for name in ("lr", "initial_lr", "max_lr") if group.get(name) is not None]
    return max(map(float, rates), default=inf)  # Adafactor may have none


def _check(rates: set[tuple[bool, float]]) -> None:
    for has_mlp, rate in sorted(rates):
        recommended = RECOMMENDED["mlp" if has_mlp else "none"]
        if TOO_LOW * rate < recommended:
            wanted = f"{recommended:.0e}".replace("e-0", "e-")
            warnings.warn(
                f"The learning rate of the prefix is {rate:.2g}, at which it learns very little: a prefix "
                f"{'with' if has_mlp else 'without'} an MLP wants about {wanted}.",
                stacklevel=4,
            )
            return


# Warns at most once per model, at its first optimizer step. Keeps no model alive, and costs nothing afterwards.
watch_learning_rate = _Watch().wait_for
