"""Models whose parameters DeepSpeed's ZeRO-3 spreads over processes, and gives to a module while it runs.

It does so once training is prepared; a model that is born partitioned is looked at before that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def is_partitioned(tensor: Any) -> bool:
    """Whether a parameter has no values of its own, in this moment."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Gives each module of `model` its own parameters while it runs, if they are spread; all processes must run it."""
    if not any(is_partitioned(parameter) for parameter in model.parameters()):
        yield
        return
    import deepspeed

    gathered: dict[nn.Module, ExitStack] = {}

    def enter(module: nn.Module, args: Any) -> None:
        spread = [parameter for parameter in module.parameters(recurse=False) if is_partitioned(parameter)]
        if spread:
            gathered[module] = ExitStack()
            gathered[module].enter_context(deepspeed.zero.GatheredParameters(spread))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in gathered:
            gathered.pop(module).close()

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield
