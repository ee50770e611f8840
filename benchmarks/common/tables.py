"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def format_spread(found: dict[str, Any], digits: int, unit: str = "", sign: str = "-") -> str:
    """Returns a result of `interleaving.spread` as the tables show it: the median, then the quartiles in parentheses.

    Args:
        sign: As in format strings: "+" writes a plus sign, too.
    """
    median, low, high = (f"{value:{sign}.{digits}f}" for value in (found["median"], *found["quartiles"]))
    return f"{median}{f' {unit}' if unit else ''} ({low} to {high})"
