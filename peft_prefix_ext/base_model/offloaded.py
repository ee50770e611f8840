"""Models whose weights accelerate keeps elsewhere, on the CPU or the disk, until a module runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def device_of(model: Any) -> torch.device:
    """Returns where a model takes its input: not where its weights are, while they are nowhere."""
    if model.device.type != "meta":
        return model.device
    devices = (hook.execution_device for module in model.modules() for hook in _hooks(module))
    return torch.device(next((device for device in devices if device is not None), model.device))


@contextmanager
def left_where_it_is(model: nn.Module) -> Iterator[None]:
    """Keeps PEFT from taking an offloaded model apart and offloading it anew with the adapter in it, as others need.

    A prefix is looked for by running the model, and changes none of its modules.
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
