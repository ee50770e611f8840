"""How good an answer is: the words that it shares with a reference."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

# The score of answers, given their references in the same order.
Metric = Callable[[Sequence[str], Sequence[str]], float]


def word_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Returns the mean F1 of words, from 0 to 1, in lower case and without punctuation, as SQuAD counts them.

    Articles count, unlike there, since answers need not be English.
    """
    return sum(map(_word_f1, answers, references)) / len(answers)


@lru_cache(maxsize=1 << 14)  # a bootstrap asks for the same pairs a thousand times
def _word_f1(answer: str, reference: str) -> float:
    ours, theirs = (Counter(re.sub(r"[^\w\s]|_", "", text.lower()).split()) for text in (answer, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total())
