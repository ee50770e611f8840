"""The F1 of words."""

from __future__ import annotations

import pytest

from peft_prefix_ext.distillation.reporting.metrics import word_f1


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The Mill, near the river!", "the mill near the river", 1.0),
        ("Aromi", "The Mill", 0.0),
        ("Aromi serves food", "Aromi", 0.5),
        ("the the", "the", 2 / 3),
        ("Crème_brûlée", "crèmebrûlée", 1.0),
        ("", "", 1.0),
        ("...", "Aromi", 0.0),
    ],
)
def test_word_f1(answer, reference, expected):
    assert word_f1([answer], [reference]) == pytest.approx(expected)
    assert word_f1([answer, "x"], [reference, "x"]) == pytest.approx((expected + 1) / 2)
