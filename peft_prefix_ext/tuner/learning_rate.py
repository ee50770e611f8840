"""Learning rates that are too low for a prefix are raised, with one warning that says so.

Trainers' defaults are meant for weights: at the 5e-5 of `Trainer`, the 2e-5 of `SFTTrainer` or LoRA's usual 2e-4 a prefix
would learn next to nothing. K/V are activations, and many times as large as weights; how far Adam moves a parameter in a step
does not depend on its size, but on the rate alone. So a lower rate counts as the lowest one that a prefix learns well at, and
keeps its schedule: warm-up and decay are shares of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from math import inf
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook
from peft_prefix_ext.injection.state_layer import PrefixStateLayer
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer

# By `reparam`: a prefix without an MLP needs about ten times the learning rate of one with it.
RECOMMENDED = {"mlp": 2e-3, "none": 2e-2}
# `min_learning_rate` by default. Both lie in the range where the loss hardly depends on the rate, see the benchmark of quality.
LOWEST = {"mlp": 1e-3, "none": 2e-2}
# Of a parameter group, but of the step that is taken now.
OWN_FIELDS = ("params", "lr")

Group = dict[str, Any]
Lowest = Mapping[int, float]


class _RaisedRates:
    """Hooks around the steps of all optimizers, from the first model with a prefix on.

    They stay: torch walks over its hooks in each step, and none can be removed meanwhile.
    """

    def __init__(self) -> None:
        self._models: WeakSet[nn.Module] = WeakSet()
        self._seen: WeakSet[Optimizer] = WeakSet()
        # The lowest rate of each parameter by its id, and the highest rate so far of each group.
        self._raised: WeakKeyDictionary[Optimizer, tuple[Lowest, list[float]]] = WeakKeyDictionary()
        self._groups: WeakKeyDictionary[Optimizer, list[Group]] = WeakKeyDictionary()
        self._is_attached = False

    def watch(self, model: nn.Module) -> None:
        """Raises the rates of all optimizers of a model, as each training makes its own."""
        self._models.add(model)
        self._seen.clear()
        if not self._is_attached:
            self._is_attached = True
            register_optimizer_step_pre_hook(self._before_step)
            register_optimizer_step_post_hook(self._after_step)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._restore(optimizer)  # if the last step failed
        if optimizer not in self._seen:
            self._seen.add(optimizer)
            self._look_at(optimizer)
        if optimizer not in self._raised:
            return
        lowest, highest = self._raised[optimizer]
        groups = optimizer.param_groups
        highest.extend([0.0] * (len(groups) - len(highest)))
        for index, group in enumerate(groups):
            # A loop that warms up by hand has no `initial_lr`; its rate may grow above the lowest one.
            highest[index] = max(highest[index], _rate(group))
        self._groups[optimizer] = groups
        optimizer.param_groups = [
            part for group, rate in zip(groups, highest, strict=True) for part in _parts(group, rate, lowest)
        ]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore(optimizer)

    def _restore(self, optimizer: Optimizer) -> None:
        """Puts the groups back, with what a step keeps in them, such as the step counts of some optimizers."""
        groups = self._groups.pop(optimizer, None)
        if groups is None:
            return
        owners = {id(parameter): group for group in groups for parameter in group["params"]}
        for part in optimizer.param_groups:
            owner = owners[id(part["params"][0])]
            owner.update({name: value for name, value in part.items() if name not in OWN_FIELDS})
        optimizer.param_groups = groups

    def _look_at(self, optimizer: Optimizer) -> None:
        """Finds the prefixes that an optimizer trains, and those of its rates that are too low."""
        if "adam" not in type(optimizer).__name__.lower():  # other optimizers need other rates
            return
        raised: dict[int, float] = {}
        for model in list(self._models):
            raised |= _trained_by(optimizer, model, _trained(model))
        rates = {
            (_rate(group), raised[id(each)])
            for group in optimizer.param_groups
            for each in group["params"]
            if id(each) in raised and _rate(group) < raised[id(each)]
        }
        if rates:
            self._raised[optimizer] = raised, []
            rate, lowest = min(rates)
            warnings.warn(
                f"The learning rate of the prefix is {rate:.2g}, at which it learns very little: it is raised to "
                f"{_written(lowest)}, the `min_learning_rate` of its config, which may be 0.",
                stacklevel=5,
            )


def _parts(group: Group, rate: float, lowest: Lowest) -> Iterator[Group]:
    """Splits a parameter group by the rate of its parameters in this step. `rate` is its own without a schedule."""
    by_factor: dict[float, list[Any]] = {}
    for parameter in group["params"]:
        factor = max(1.0, lowest.get(id(parameter), 0.0) / rate) if rate else 1.0
        by_factor.setdefault(factor, []).append(parameter)
    for factor, parameters in by_factor.items():
        yield {**group, "params": parameters, "lr": group["lr"] * factor}


def _trained(model: nn.Module) -> dict[int, float]:
    """Maps the id of each trainable prefix parameter of `model` to its lowest learning rate."""
    found = {}
    configs: Any = getattr(model, "peft_config", {})
    for module in model.modules():
        if not isinstance(module, PrefixTunerLayer):
            continue
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                adapter = name.split(".")[1]
                wanted = getattr(configs.get(adapter), "min_learning_rate", None)
                # A state beside an MLP is scaled to fit its rate.
                has_mlp = isinstance(module, PrefixDecoderHook) or (
                    isinstance(module, PrefixStateLayer) and module.has_reparam(adapter)
                )
                found[id(parameter)] = LOWEST["mlp" if has_mlp else "none"] if wanted is None else wanted
    return found


def _trained_by(optimizer: Optimizer, model: nn.Module, found: dict[int, float]) -> dict[int, float]:
    """Returns the part of `found` that an optimizer trains.

    DeepSpeed's ZeRO gives an optimizer flat parts of its own instead of the parameters. If a prefix is all that is trained,
    they are the prefix.
    """
    given = [each for group in optimizer.param_groups for each in group["params"]]
    own = {id(each): found[id(each)] for each in given if id(each) in found}
    trained = [each for each in model.parameters() if each.requires_grad]
    are_parts = all(hasattr(each, "ds_id") or hasattr(each, "_hp_mapping") for each in trained)
    if not own and found and are_parts and found.keys() == {id(each) for each in trained}:
        return dict.fromkeys(map(id, given), min(found.values()))
    return own


def _rate(group: Group) -> float:
    """Returns the learning rate of a group without the warm-up of a scheduler."""
    rates = [group[name] for name in ("lr", "initial_lr", "max_lr") if group.get(name) is not None]
    return max(map(float, rates), default=inf)  # Adafactor may have none


def _written(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


# Keeps no model alive.
raise_low_learning_rates = _RaisedRates().watch
