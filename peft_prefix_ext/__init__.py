"""Prefix tuning for PEFT, from training to production.

`import peft_prefix_ext` is all it takes for PEFT to know the type `PREFIX_EXT`. Exports load lazily, so that a serving
process that only reads checkpoints imports neither peft nor transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from peft_prefix_ext.checkpoint.format import PrefixCheckpoint, PrefixCheckpointError, read_prefix
    from peft_prefix_ext.checkpoint.writer import write_prefix
    from peft_prefix_ext.config import PrefixExtConfig
    from peft_prefix_ext.conversion.compose import compose
    from peft_prefix_ext.conversion.stock_peft import export_to_peft, import_from_peft
    from peft_prefix_ext.tuner.model import PrefixExtModel

__version__ = "0.2.0"

# Where each name is imported from; the model's module registers with PEFT.
_EXPORTS = {
    "PrefixCheckpoint": "checkpoint.format",
    "PrefixCheckpointError": "checkpoint.format",
    "PrefixExtConfig": "tuner.model",
    "PrefixExtModel": "tuner.model",
    "compose": "conversion.compose",
    "export_to_peft": "conversion.stock_peft",
    "import_from_peft": "conversion.stock_peft",
    "read_prefix": "checkpoint.format",
    "write_prefix": "checkpoint.writer",
}

__all__ = [
    "PrefixCheckpoint",
    "PrefixCheckpointError",
    "PrefixExtConfig",
    "PrefixExtModel",
    "compose",
    "export_to_peft",
    "import_from_peft",
    "read_prefix",
    "write_prefix",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


@wrapt.when_imported("peft")
def _register(peft: Any) -> None:
    """Registers the type as soon as there is a PEFT to register with.

    PEFT has no entry points for methods: without this, `PeftModel.from_pretrained` of our adapters is a KeyError.
    """
    ours = [module for name, module in sys.modules.items() if name.startswith(f"{__name__}.")]
    # Where one of our own modules brought PEFT in, the model's is not far behind, and cannot come before it.
    if not any(getattr(module.__spec__, "_initializing", False) for module in ours):
        import_module(f"{__name__}.tuner.model")
