"""Media of a request with a prefix."""

from __future__ import annotations

import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_plugin.scheduler.media import moved, placeholder

IMAGE, START, END = 7, 8, 9


def feature(offset: int, length: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(
        data=None, modality="image", identifier="one", mm_position=PlaceholderRange(offset=offset, length=length)
    )


@pytest.mark.parametrize(
    ("prompt", "images", "token"),
    [
        ([1, 2, 3], [], 1),
        ([START, START], [], START),
        ([1, START, IMAGE, IMAGE, END, 2], [(2, 2)], 1),
        # An image comes first.
        ([START, IMAGE, IMAGE, END, 2, 3], [(1, 2)], 2),
        # The marks belong to its range; what stands beside it counts as a mark.
        ([START, IMAGE, END, 3, 2], [(0, 3)], 2),
        # The first token is one of media further on.
        ([START, 2, START, IMAGE, END, 3], [(3, 1)], 2),
        # Media alone.
        ([START, IMAGE, END], [(1, 1)], END),
    ],
)
def test_the_placeholder_is_a_text_token_of_the_prompt(prompt: list, images: list, token: int) -> None:
    assert placeholder(prompt, [feature(*image) for image in images]) == token


def test_media_move_and_the_originals_stay() -> None:
    features = [feature(2, 4), feature(8, 1)]
    after = moved(features, 45)
    assert [(each.mm_position.offset, each.mm_position.length) for each in after] == [(47, 4), (53, 1)]
    assert [each.mm_position.offset for each in features] == [2, 8]
    assert [each.identifier for each in after] == ["one", "one"]
