"""What transformers calls the cache among the arguments of a module.

`cache` since 5.24, `past_key_values` before and in models of other packages, `layer_past` in a few attention modules. Each
module's own signature tells, so that old and new ones work side by side.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

NAMES = ("cache", "past_key_values", "layer_past", "past_key_value")


def cache_argument(module: nn.Module) -> str | None:
    """Returns what `module.forward` calls the cache; `None` if it takes none by a name of its own."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Returns the cache among the keyword arguments of a call, or the fields of an output, whatever its name."""
    # Not asked for by name: outputs of transformers answer to the old one with a warning.
    return next((value for name, value in arguments.items() if name in NAMES and value is not None), None)
