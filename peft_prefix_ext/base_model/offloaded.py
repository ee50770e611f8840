"""Models that accelerate offloads: their weights are on the CPU or the disk until a module runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def input_device(model: Any) -> torch.device:
    """Returns the device of a model's inputs, which is not that of its weights while they are offloaded."""
    if model.device.type != "meta":
        return model.device
    devices = (hook.execution_device for module in model.modules() for hook in _hooks(module))
    return torch.device(next((device for device in devices if device is not None), model.device))


@contextmanager
def keep_offloading(model: nn.Module) -> Iterator[None]:
    """Hides `hf_device_map` from PEFT, which would dispatch the model again to place a new adapter.

    A prefix needs no new dispatch: it replaces no module of the model.
    """
    devices = vars(model).pop("hf_device_map", None)
    try:
        yield
    finally:
        if devices is not None:
            model.hf_device_map = devices


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if hasattr(one, "execution_device"):
            yield one
