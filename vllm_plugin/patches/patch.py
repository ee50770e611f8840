"""A patched method of vLLM: checked against what the wrapper expects, and attached once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import wrapt

Version = tuple[float, float]
# A build of vLLM between two releases, whose version may say little, is taken for newer than all of them.
DEVELOPMENT: Version = (math.inf, 0)
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
        since: The first release of vLLM that has the method; older ones do without the patch.
        before: The first release that no longer has it, or needs no patch.
    """

    module: str
    method: str
    parameters: tuple[str, ...]
    wrapper: Callable[..., Any]
    in_workers: bool = False
    since: Version = (0, 0)
    before: Version = (math.inf, math.inf)

    def is_for(self, version: Version) -> bool:
        """Returns whether a release of vLLM needs the patch."""
        return self.since <= version < self.before

    def problem(self, module: ModuleType) -> str | None:
        """Returns how the method differs from what the wrapper expects; None if it does not."""
        target: Any = module
        for part in self.method.split("."):
            target = getattr(target, part, None)
        if not callable(target):
            return f"{self.module} has no {self.method}"
        missing = [name for name in self.parameters if name not in inspect.signature(target).parameters]
        return f"{self.method} has no parameter {', '.join(missing)}" if missing else None


def vllm_version() -> Version:
    """Returns the first two numbers of the version of vLLM."""
    import vllm

    if "dev" in vllm.__version__:
        return DEVELOPMENT
    major, minor = (int(part) for part in vllm.__version__.split(".")[:2])
    return major, minor


def attach(patch: MethodPatch, module: ModuleType) -> None:
    """Attaches a patch that this vLLM needs, once. One that does not fit is left out and recorded in `problems`."""
    if patch.method in _attached or not patch.is_for(vllm_version()):
        return
    if problem := patch.problem(module):
        problems[patch.method] = problem
    else:
        wrapt.wrap_function_wrapper(module, patch.method, patch.wrapper)
        _attached.add(patch.method)
