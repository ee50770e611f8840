"""From the options of a trainer's file to a `PrefixExtConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from peft_prefix_ext.config import PrefixExtConfig

# What the tuner sets.
_NOT_OPTIONS = (
    "context",
    "init_report",
    "prefix_layers",
    "prefix_states",
    "base_fingerprint",
    "base_adapters",
    "format_version",
)
# By the end of the name of a model's class.
_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


def option_names() -> list[str]:
    """Lists the fields of `PrefixExtConfig` that a user sets: `task_type`, and those that no other config of PEFT has."""
    inherited = {each.name for each in fields(PrefixExtConfig.__mro__[1])}
    own = [each.name for each in fields(PrefixExtConfig) if each.name not in inherited]
    return ["task_type", *(name for name in own if name not in _NOT_OPTIONS)]


def config_of(options: Mapping[str, Any] | None, task_type: str | None = "CAUSAL_LM") -> PrefixExtConfig:
    """Returns the config of a prefix.

    Args:
        options: Fields of `PrefixExtConfig`.
        task_type: The task type, if `options` has none.

    Raises:
        ValueError: If an option is unknown, or has a wrong value.
    """
    given = dict(options or {})
    unknown = [name for name in given if name not in option_names()]
    if unknown:
        raise ValueError(f"A prefix has no option {unknown[0]!r}: take one of {', '.join(option_names())}.")
    return PrefixExtConfig(**{"task_type": task_type, **given})


def task_type_of(model: nn.Module) -> str:
    """Returns PEFT's task type for a model of transformers, by the head that it has."""
    name = type(model).__name__
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), "CAUSAL_LM")
