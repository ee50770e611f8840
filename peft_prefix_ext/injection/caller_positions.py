"""Calls of the models around a decoder: whether the caller gave positions.

A model around the decoder may make them up by itself (Gemma 4), and then counts padding.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Sequence
from typing import Any

from torch import nn


class _OfThread(threading.local):
    gave_positions: bool | None = None

    def __reduce__(self) -> tuple[type[_OfThread], tuple[()]]:
        return _OfThread, ()


class OuterCalls:
    """Hooks on the models around a decoder.

    Args:
        models: The models, from the outermost on.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._of_thread = _OfThread()
        self.handles = [
            model.register_forward_pre_hook(
                functools.partial(self._before, number == 0, list(inspect.signature(model.forward).parameters)),
                with_kwargs=True,
            )
            for number, model in enumerate(models)
        ]

    def gave_positions(self) -> bool | None:
        """Returns, once for each call of the decoder, whether those around it gave positions; `None` if there was none."""
        gave, self._of_thread.gave_positions = self._of_thread.gave_positions, None
        return gave

    def _before(
        self, is_outermost: bool, names: list[str], model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        before = True if is_outermost else self._of_thread.gave_positions is not False
        self._of_thread.gave_positions = before and given.get("position_ids") is not None


def modules_around(decoder: nn.Module, model: nn.Module) -> list[nn.Module]:
    """Returns the modules of `model` that `decoder` is in and that take positions, from the outermost on."""
    return [
        module
        for module in model.modules()
        if module is not decoder
        and any(inner is decoder for inner in module.modules())
        and "position_ids" in inspect.signature(module.forward).parameters
    ]
