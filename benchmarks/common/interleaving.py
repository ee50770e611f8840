"""Measurements side by side: every candidate once per round, and ratios within rounds.

A machine is not equally fast all the time. What is measured within seconds of each other is, mostly; so a result is the
median over the rounds of a ratio, with its spread, and no absolute time is compared with one of another run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

Measurement = dict[str, float]


def interleave(
    candidates: Mapping[str, Callable[[], Measurement]], rounds: int, seed: int = 0, warm_ups: int = 1
) -> dict[str, list[Measurement]]:
    """Calls every candidate once per round, in a new order each time.

    Args:
        warm_ups: Rounds before those that count.

    Returns:
        The measurements of each candidate, by round.
    """
    order, results = random.Random(seed), {name: [] for name in candidates}  # type: ignore[var-annotated]
    for number in range(warm_ups + rounds):
        names = list(candidates)
        order.shuffle(names)
        for name in names:
            measured = candidates[name]()
            if number >= warm_ups:
                results[name].append(measured)
    return results


def ratio(ours: Sequence[Measurement], theirs: Sequence[Measurement], field: str) -> dict[str, Any]:
    """Returns the median of a field's ratio within rounds, and the quartiles around it.

    Args:
        ours: The numerators, by round.
        theirs: The denominators, of the same rounds.
    """
    return spread([mine[field] / other[field] for mine, other in zip(ours, theirs, strict=True)])


def difference(ours: Sequence[Measurement], theirs: Sequence[Measurement], field: str) -> dict[str, Any]:
    """Returns the median of what a field of ours is more than theirs within rounds, and the quartiles around it."""
    return spread([mine[field] - other[field] for mine, other in zip(ours, theirs, strict=True)])


def shown(found: dict[str, Any], digits: int) -> str:
    """Returns a result of `ratio` as tables have it: the median, and the quartiles in brackets."""
    low, high = found["quartiles"]
    return f"{found['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns median and quartiles; of a single value, that value."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": round(median(values), 4), "quartiles": [round(low, 4), round(high, 4)], "rounds": len(values)}
