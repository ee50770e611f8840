"""Prefixes that a student is to stand beside, put behind it in some steps of its training.

Prefixes that were trained apart and then put together collapse (Cartridges at Scale, arXiv 2606.04557). One that has met
others in training does not. As in `compose(positions="keep")`, each keeps the positions of its own keys, and the text
follows all.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from peft_prefix_ext.checkpoint.format import PrefixCheckpoint
from peft_prefix_ext.conversion.sources import check_fits, read_source


class Companions:
    """Draws which prefixes stand beside the student in a batch.

    Args:
        sources: Prefixes of the same base model: folders or repositories.
        model: The base model.
        share: The share of batches with companions; how many is drawn first, each number as likely, and then which.
        seed: What the draws follow.

    Raises:
        ValueError: If a prefix does not fit the model, or has states of recurrent layers, which cannot stand behind others.
    """

    def __init__(
        self, sources: Sequence[str | Path], model: PreTrainedModel, *, share: float = 0.25, seed: int = 0
    ) -> None:
        self.prefixes = [read_source(source) for source in sources]
        for prefix in self.prefixes:
            if prefix.states:
                raise ValueError(
                    f"The prefix in {prefix.path} has states of recurrent layers, which cannot stand beside another prefix: "
                    "distil each context alone, or all of them in one."
                )
            check_fits(prefix, model)
        self.model = model
        self.share = share
        self._random = random.Random(seed)

    def draw(self, batch_size: int) -> Cache | None:
        """Returns the cache of a batch with companions, or `None` for a batch in which the student is alone."""
        if self._random.random() >= self.share:
            return None
        count = self._random.randint(1, len(self.prefixes))
        return self._cache(self._random.sample(self.prefixes, count), batch_size)

    def _cache(self, prefixes: Sequence[PrefixCheckpoint], batch_size: int) -> Cache:
        cache = DynamicCache(config=self.model.config)
        for index in prefixes[0].layers:
            kv = (
                torch.cat(tensors, dim=1)
                for tensors in zip(*(prefix.layers[index] for prefix in prefixes), strict=True)
            )
            key, value = (
                tensor.to(self.model.device, self.model.dtype).expand(batch_size, -1, -1, -1) for tensor in kv
            )
            cache.update(key, value, index)
        return cache
