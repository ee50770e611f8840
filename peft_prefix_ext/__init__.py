"""Prefix tuning for PEFT, from training to production.

`import peft_prefix_ext` registers the type `PREFIX_EXT` with PEFT. Exports load lazily, so that a server that only reads
checkpoints imports neither peft nor transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from peft_prefix_ext.checkpoint.format import PrefixCheckpoint, PrefixCheckpointError
    from peft_prefix_ext.checkpoint.reader import read_prefix
    from peft_prefix_ext.checkpoint.writer import write_prefix
    from peft_prefix_ext.config import PrefixExtConfig
    from peft_prefix_ext.conversion.compose import compose
    from peft_prefix_ext.conversion.stock_peft import export_to_peft, import_from_peft
    from peft_prefix_ext.tuner.model import PrefixExtModel

__version__ = "0.2.0"

# The module of each export.
_EXPORTS = {
    "PrefixCheckpoint": "checkpoint.format",
    "PrefixCheckpointError": "checkpoint.format",
    "PrefixExtConfig": "config",
    "PrefixExtModel": "tuner.model",
    "compose": "conversion.compose",
    "export_to_peft": "conversion.stock_peft",
    "import_from_peft": "conversion.stock_peft",
    "read_prefix": "checkpoint.reader",
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


def _register(module: Any) -> None:
    """Registers the type with PEFT, which the tuner does when it is imported.

    PEFT has no entry points for methods: without this, `PeftModel.from_pretrained` of our adapters is a KeyError.
    """
    ours = [other for name, other in sys.modules.items() if name.startswith(f"{__name__}.") and other is not module]
    # The tuner imports most of this package, so it must not come while one of these modules is half imported itself.
    if "peft" in sys.modules and not any(getattr(other.__spec__, "_initializing", False) for other in ours):
        import_module(f"{__name__}.tuner.model")


def _modules() -> Iterator[str]:
    """Yields the names of all modules of this package, without importing them."""
    root = Path(__file__).parent
    for path in root.rglob("*.py"):
        *folders, name = path.relative_to(root).with_suffix("").parts
        yield ".".join([__name__, *folders, *([] if name == "__init__" else [name])])


# As soon as PEFT is imported or, if one of our own modules imports it, at the end of that.
for _name in ("peft", *_modules()):
    if _name != __name__:
        wrapt.register_post_import_hook(_register, _name)
