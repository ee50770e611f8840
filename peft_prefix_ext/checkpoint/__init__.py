"""The format on disk, shared by training and serving. Imports neither peft nor transformers nor vllm.

Exports load lazily: `compatibility` and `fingerprint` do not even need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_prefix_ext.checkpoint.base_adapters import BaseAdapter
    from peft_prefix_ext.checkpoint.format import (
        LayerKV,
        LayerState,
        PrefixCheckpoint,
        PrefixCheckpointError,
        PrefixNotFoundError,
    )
    from peft_prefix_ext.checkpoint.hub import resolve
    from peft_prefix_ext.checkpoint.reader import read_prefix
    from peft_prefix_ext.checkpoint.writer import write_prefix

# The module of each export.
_EXPORTS = {
    "BaseAdapter": "base_adapters",
    "LayerKV": "format",
    "LayerState": "format",
    "PrefixCheckpoint": "format",
    "PrefixCheckpointError": "format",
    "PrefixNotFoundError": "format",
    "read_prefix": "reader",
    "resolve": "hub",
    "write_prefix": "writer",
}

__all__ = [
    "BaseAdapter",
    "LayerKV",
    "LayerState",
    "PrefixCheckpoint",
    "PrefixCheckpointError",
    "PrefixNotFoundError",
    "read_prefix",
    "resolve",
    "write_prefix",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
