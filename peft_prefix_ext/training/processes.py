"""The processes of a training, as `Trainer` sees them.

Without an accelerator it takes processes for several only with `use_cpu`, and else each would train alone, into one folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState


def needs_cpu() -> bool:
    """Returns what `use_cpu` is by default."""
    return not torch.accelerator.is_available()


def processes(arguments: Mapping[str, Any]) -> PartialState:
    """Returns what accelerate knows of the processes of a training.

    Args:
        arguments: The given ones of `TrainingArguments`.
    """
    return PartialState(cpu=bool(arguments.get("use_cpu", needs_cpu())))
