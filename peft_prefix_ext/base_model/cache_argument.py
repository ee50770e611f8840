"""The name of the cache among the arguments of a module.

transformers calls it `cache` since 5.24 and `past_key_values` before; models of other packages keep the old name, and a
few attention modules have `layer_past`. The mixers of recurrent layers called it `cache_params` before 5.24. The signature
of each module tells, so that all of them work side by side.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value", "cache_params")


def cache_argument(module: nn.Module) -> str | None:
    """Returns the name of the cache argument of `module.forward`; `None` if it has none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """Returns the cache among the keyword arguments of a call, or among the fields of an output; `None` if there is none."""
    # Iterates instead of looking names up: outputs of transformers answer to the old name with a warning.
    return next((value for name, value in arguments.items() if name in CACHE_NAMES and value is not None), None)
