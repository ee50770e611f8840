"""Shares are given where the context adds something beyond chance, and nowhere else."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from peft_prefix_ext.distillation.reporting.recovered_share import MIN_QUESTIONS, separation


def compared(nothing, full, seed=0):
    def of(values):
        return lambda indices: fmean(values[index] for index in indices)

    return separation(of(nothing), of(full), len(nothing), seed=seed)


def test_the_share_runs_from_nothing_to_the_full_context():
    found = compared([0.1, 0.3, 0.2, 0.0, 0.4, 0.2], [0.6, 0.7, 0.9, 0.5, 0.8, 0.7])
    assert found.is_clear
    assert found.recovered_share(found.nothing) == 0.0
    assert found.recovered_share(found.full) == 1.0
    assert found.recovered_share((found.nothing + found.full) / 2) == pytest.approx(0.5)
    assert found.interval[0] < found.full - found.nothing < found.interval[1]


@pytest.mark.parametrize(
    ("nothing", "full"),
    [
        ([0.5] * 8, [0.5] * 8),
        ([0.0, 1.0] * 8, [1.0, 0.0, 0.0, 1.0] * 4),  # one question more, one less
        ([0.5] * 8, [0.1] * 8),  # worse than nothing
        ([0.0] * (MIN_QUESTIONS - 1), [1.0] * (MIN_QUESTIONS - 1)),
    ],
)
def test_no_verdict(nothing, full):
    found = compared(nothing, full)
    assert not found.is_clear
    assert found.recovered_share(0.7) is None


def test_the_comparison_is_paired():
    """The same small gain on each question is seen through large differences between questions."""
    draws = random.Random(0)
    nothing = [draws.uniform(0, 100) for _ in range(20)]
    assert compared(nothing, [value + 1 for value in nothing]).is_clear
    assert not compared(nothing, sorted(value + 1 for value in nothing)).is_clear


def test_chance_is_rarely_taken_for_a_difference():
    draws = random.Random(1)
    clear = sum(
        compared([draws.gauss(0, 1) for _ in range(24)], [draws.gauss(0, 1) for _ in range(24)]).is_clear
        for _ in range(60)
    )
    assert clear <= 6  # 2.5 % expected, on one side


def test_the_interval_follows_the_seed():
    draws = random.Random(0)
    nothing, full = ([draws.random() for _ in range(10)] for _ in range(2))
    first, again, other = (compared(nothing, full, seed).interval for seed in (1, 1, 2))
    assert first == again != other
