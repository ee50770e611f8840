"""Interleaved measurement: every candidate runs once per round, and results are ratios within rounds.

The speed of a machine drifts, so absolute times of different runs are not comparable. Measurements taken within seconds of
each other mostly are. A result is therefore the median over the rounds of a ratio, with its quartiles.
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
    """Calls every candidate once per round, in a new random order each time.

    Args:
        candidates: By name.
        rounds: The number of rounds that count.
        seed: For the order.
        warm_ups: The number of rounds before those.

    Returns:
        The measurements of each candidate, by round.
    """
    order = random.Random(seed)
    results: dict[str, list[Measurement]] = {name: [] for name in candidates}
    for number in range(warm_ups + rounds):
        names = list(candidates)
        order.shuffle(names)
        for name in names:
            measured = candidates[name]()
            if number >= warm_ups:
                results[name].append(measured)
    return results


def ratio(ours: Sequence[Measurement], theirs: Sequence[Measurement], field: str) -> dict[str, Any]:
    """Returns median and quartiles of a field's ratio within rounds.

    Args:
        ours: The numerators, by round.
        theirs: The denominators of the same rounds.
        field: The name of the measured value.
    """
    return spread([mine[field] / other[field] for mine, other in zip(ours, theirs, strict=True)])


def difference(ours: Sequence[Measurement], theirs: Sequence[Measurement], field: str) -> dict[str, Any]:
    """Returns median and quartiles of a field's difference within rounds."""
    return spread([mine[field] - other[field] for mine, other in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns median and quartiles; for a single value, all three are that value."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": round(median(values), 4), "quartiles": [round(low, 4), round(high, 4)], "rounds": len(values)}
