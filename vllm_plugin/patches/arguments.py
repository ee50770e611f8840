"""The arguments of a call to a patched method by name, whether they were passed by position or by keyword."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def all_arguments(wrapped: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns the arguments of a call to a bound method by name."""
    return {**dict(zip(_positions(getattr(wrapped, "__func__", wrapped)), args, strict=False)), **kwargs}


def replaced(wrapped: Any, args: Any, kwargs: Any, name: str, value: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the arguments of a call to a bound method with another value for one of them."""
    if name in kwargs:
        return args, {**kwargs, name: value}
    return (), {**all_arguments(wrapped, args, kwargs), name: value}


def argument(wrapped: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Returns one argument, or None if it was not passed. Called for each request, so it builds no dict."""
    if name in kwargs:
        return kwargs[name]
    position = _positions(getattr(wrapped, "__func__", wrapped))[name]
    return args[position] if position < len(args) else None


@functools.cache
def _positions(function: Any) -> dict[str, int]:
    names = list(inspect.signature(function).parameters)[1:]
    return {name: position for position, name in enumerate(names)}
