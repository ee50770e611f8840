"""Whether the caller of a model gave `position_ids`, seen from the decoder inside it.

A model around the decoder may make up positions itself (Gemma 4), which count padding. The decoder sees positions in
both cases, and keeps only those that the caller gave.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Sequence
from typing import Any

from torch import nn


class _ThreadState(threading.local):
    gave_positions: bool | None = None

    def __reduce__(self) -> tuple[type[_ThreadState], tuple[()]]:
        return _ThreadState, ()


class CallerPositions:
    """Hooks on the models around a decoder.

    Args:
        models: The models that contain the decoder, the outermost first.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._thread_state = _ThreadState()
        self.handles = [
            model.register_forward_pre_hook(
                functools.partial(self._before_model, number == 0, list(inspect.signature(model.forward).parameters)),
                with_kwargs=True,
            )
            for number, model in enumerate(models)
        ]

    def take(self) -> bool | None:
        """Returns whether the current call of the models has `position_ids`, and resets it for the next call.

        `None` if the decoder was called by itself.
        """
        gave, self._thread_state.gave_positions = self._thread_state.gave_positions, None
        return gave

    def _before_model(
        self, is_outermost: bool, parameters: list[str], model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
        so_far = True if is_outermost else self._thread_state.gave_positions is not False
        self._thread_state.gave_positions = so_far and arguments.get("position_ids") is not None


def enclosing_models(decoder: nn.Module, model: nn.Module) -> list[nn.Module]:
    """Returns the modules of `model` that contain `decoder` and take `position_ids`, the outermost first."""
    return [
        module
        for module in model.modules()
        if module is not decoder
        and any(inner is decoder for inner in module.modules())
        and "position_ids" in inspect.signature(module.forward).parameters
    ]
