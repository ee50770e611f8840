"""The arguments of a call to a method that is wrapped, by name, however the caller gave them."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def all_arguments(wrapped: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns the arguments of a call to a bound method, by name."""
    return {**dict(zip(_places(getattr(wrapped, "__func__", wrapped)), args, strict=False)), **kwargs}


def argument(wrapped: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Returns one of them, or None: each request comes by, and most go on as they came."""
    if name in kwargs:
        return kwargs[name]
    place = _places(getattr(wrapped, "__func__", wrapped))[name]
    return args[place] if place < len(args) else None


@functools.cache
def _places(function: Any) -> dict[str, int]:
    names = list(inspect.signature(function).parameters)[1:]
    return {name: place for place, name in enumerate(names)}
