"""Images, audio and video of a request with a prefix: where they stand, and which token may stand for the prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any


def moved(features: Sequence[Any], p: int) -> list[Any]:
    """Returns copies of a prompt's media, vLLM's `MultiModalFeatureSpec`, that stand `p` tokens further behind.

    The originals stay as they are: an engine in the front end's process shares them with it, and vLLM's processor cache
    shares their positions between requests.
    """
    return [
        replace(feature, mm_position=replace(feature.mm_position, offset=feature.mm_position.offset + p))
        for feature in features
    ]


def placeholder(prompt: Sequence[int], features: Sequence[Any]) -> int:
    """Returns the token of a prompt that stands for virtual tokens.

    It is one of the prompt's own. So the set of prompt tokens, which the repetition penalty uses, stays the same, and
    every kernel that reads prompt ids gets a valid one.

    Some models search the whole prompt for the tokens that stand for media and for the marks around them, to count
    positions or to drop parts of a video. So the token is one that stands neither in nor beside media, unless there is
    none.
    """
    if not features:
        return prompt[0]
    of_media: set[int] = set()
    for feature in features:
        start, length = feature.mm_position.offset, feature.mm_position.length
        of_media.update(prompt[max(0, start - 1) : start + length + 1])
    return next((token for token in prompt if token not in of_media), prompt[-1])
