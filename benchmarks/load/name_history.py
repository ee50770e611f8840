"""Which adapter each name refers to over time, and so which answers are right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BASE = "base"


@dataclass
class Assignment:
    """The adapter that a name refers to, or None, during a period of time.

    Args:
        adapter: The adapter.
        begin: The first moment.
        end: The last moment.
        refusal: The status of a request for the name, if it refers to no adapter.
    """

    adapter: str | None
    begin: float = -math.inf
    end: float = math.inf
    refusal: str = "404"


class NameHistory:
    """The adapters that each model name has referred to.

    Args:
        adapters: The adapters, each under its own name at the start.
    """

    def __init__(self, adapters: Sequence[str]) -> None:
        self.assignments: dict[str, list[Assignment]] = {name: [Assignment(name)] for name in (*adapters, BASE)}

    def now(self, name: str) -> str | None:
        return self.assignments[name][-1].adapter

    def during(self, name: str, begin: float, end: float) -> list[Assignment]:
        """Returns all that a name referred to between two points in time."""
        return [one for one in self.assignments[name] if one.begin <= end and begin <= one.end]
