"""The offset of positions that models with rotary embeddings of several axes remember (Qwen-VL, GLM-4V and relatives).

An image has fewer positions than tokens, so the text behind it goes on at another position than the number of tokens
before it. These models keep the difference of each row of their last call in an attribute, for the decoding steps that
follow. They also take it for other calls with a cache, such as a probe with a batch of another size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_ATTRIBUTE = "rope_deltas"


def has_rope_deltas(model: nn.Module) -> bool:
    """Whether positions behind an image of `model` can differ from the number of tokens before them."""
    return any(hasattr(module, _ATTRIBUTE) for module in model.modules())


@contextmanager
def without_rope_deltas(model: nn.Module) -> Iterator[None]:
    """Runs `model` as if no call had preceded, and then restores what it remembers of the last one."""
    kept = {module: getattr(module, _ATTRIBUTE) for module in model.modules() if hasattr(module, _ATTRIBUTE)}
    for module in kept:
        setattr(module, _ATTRIBUTE, None)
    try:
        yield
    finally:
        for module, deltas in kept.items():
            setattr(module, _ATTRIBUTE, deltas)
