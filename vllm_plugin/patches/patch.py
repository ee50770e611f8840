"""A patched method of vLLM: checked against what the wrapper expects, and attached once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import wrapt

# By method: why a patch does not fit this vLLM, and which patches are attached.
problems: dict[str, str] = {}
_attached: set[str] = set()


@dataclass(frozen=True, slots=True)
class MethodPatch:
    """One wrapped method.

    Args:
        module: vLLM's module.
        method: `Class.method` in it.
        parameters: Names of parameters that the method must have.
        wrapper: Runs instead of the method, with the arguments that `wrapt` passes.
        in_workers: Whether only workers use the module, which no other process should have to import.
    """

    module: str
    method: str
    parameters: tuple[str, ...]
    wrapper: Callable[..., Any]
    in_workers: bool = False

    def problem(self, module: ModuleType) -> str | None:
        """Returns how the method differs from what the wrapper expects; None if it does not."""
        target: Any = module
        for part in self.method.split("."):
            target = getattr(target, part, None)
        if not callable(target):
            return f"{self.module} has no {self.method}"
        missing = [name for name in self.parameters if name not in inspect.signature(target).parameters]
        return f"{self.method} has no parameter {', '.join(missing)}" if missing else None


def attach(patch: MethodPatch, module: ModuleType) -> None:
    """Attaches a patch, once. One that does not fit is left out and recorded in `problems`."""
    if patch.method in _attached:
        return
    if problem := patch.problem(module):
        problems[patch.method] = problem
    else:
        wrapt.wrap_function_wrapper(module, patch.method, patch.wrapper)
        _attached.add(patch.method)
