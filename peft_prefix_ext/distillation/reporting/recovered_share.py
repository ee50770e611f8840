"""How much of what a context adds a prefix keeps, and whether the context adds anything at all."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# With fewer questions no difference is beyond chance at 5 %, even if all of them go the same way: 2 * 0.5**5 > 0.05.
MIN_QUESTIONS = 6
_RESAMPLES = 1000

# The score on some of the questions, by their indices, in which one may come several times.
Score = Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class Separation:
    """Nothing and the full context on one measure.

    Args:
        nothing: The score without a context.
        full: The score with the full context.
        interval: Both ends of the 95 % interval of `full - nothing`, over which questions were asked; `None` if they were
            fewer than `MIN_QUESTIONS`.
    """

    nothing: float
    full: float
    interval: tuple[float, float] | None

    @property
    def is_clear(self) -> bool:
        """Whether the full context is better than nothing beyond chance."""
        return self.interval is not None and self.interval[0] > 0

    def recovered_share(self, prefix: float) -> float | None:
        """Returns (prefix - nothing) / (full - nothing), `None` where the two do not separate.

        Args:
            prefix: The score of the prefix.
        """
        return (prefix - self.nothing) / (self.full - self.nothing) if self.is_clear else None


def separation(nothing: Score, full: Score, num_questions: int, *, seed: int = 0) -> Separation:
    """Compares nothing with the full context on the same questions, by a paired bootstrap over them.

    Args:
        nothing: The score without a context.
        full: The score with the full context.
        num_questions: The number of questions, over whose indices both are called.
        seed: The seed of the resampled questions.
    """
    everything = range(num_questions)
    interval = None
    if num_questions >= MIN_QUESTIONS:
        draws = random.Random(seed)
        samples = (draws.choices(everything, k=num_questions) for _ in range(_RESAMPLES))
        differences = sorted(full(sample) - nothing(sample) for sample in samples)
        outside = _RESAMPLES // 40  # 2.5 % at each end
        interval = differences[outside], differences[-outside - 1]
    return Separation(nothing(everything), full(everything), interval)
