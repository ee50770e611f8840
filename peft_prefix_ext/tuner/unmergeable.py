"""PEFT methods for adapters that change weights; a prefix changes none, and refuses them."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner


class UnmergeableTuner(BaseTuner):
    """A tuner that refuses to merge."""

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        raise ValueError(
            "A prefix changes no weight, so there is nothing to merge; use `unload` to get the base model."
        )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            'Prefixes are not weights that can be added; start a new one from their mean with `init="average"`.'
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("A prefix changes no weight, so there is nothing to merge.")

    def unmerge_adapter(self) -> None:
        raise ValueError("A prefix changes no weight, so there is nothing to unmerge.")
