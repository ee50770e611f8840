"""What PEFT offers for methods that change weights, and why there is no such thing for a prefix."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner


class UnmergeableTuner(BaseTuner):
    """A tuner that changes no weight, and says so."""

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        raise ValueError(
            "A prefix changes no weight, so there is nothing to merge; use `unload` to get the base model."
        )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            'Prefixes are no weights that could be added up, as those of LoRA are; start a new one with `init="average"`.'
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("A prefix changes no weight, so there is nothing to merge.")

    def unmerge_adapter(self) -> None:
        raise ValueError("A prefix changes no weight, so there is nothing to unmerge.")
