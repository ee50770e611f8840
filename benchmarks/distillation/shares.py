"""Recovered shares of documents, by seed, and numbers as the tables show them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from benchmarks.common.results import Record
from benchmarks.distillation.tasks.documents import TASK


class DocumentResults:
    """The records of one document.

    Args:
        content: The results file.
        document: The document.
    """

    def __init__(self, content: Record, document: str) -> None:
        found = [
            record for record in content["records"] if (record["task"], record.get("document")) == (TASK, document)
        ]
        self.references = {record["seed"]: record for record in found if record["length"] is None}
        # Without nothing and the full context of the same seed, nothing can be said.
        self.records = [record for record in found if record["length"] and record["seed"] in self.references]

    @property
    def lengths(self) -> list[int]:
        return sorted({record["length"] for record in self.records})

    @property
    def rows(self) -> list[str]:
        """The names of the rows, in their order in the fullest record."""
        fullest = sorted(self.records, key=lambda record: -len(record["rows"]))
        return list(dict.fromkeys(name for record in fullest for name in record["rows"]))

    def has(self, measure: str) -> bool:
        """Whether the measure was taken."""
        return any(measure in record["rows"]["nothing"] for record in self.references.values())

    def is_clear(self, measure: str) -> bool:
        """Whether the measure was taken, and the full context is better than nothing beyond chance, with each seed."""
        intervals = [record["intervals"].get(measure) for record in self.references.values()]
        return all(interval is not None and interval[0] > 0 for interval in intervals)

    def is_ahead(self, name: str, length: int, measure: str) -> bool:
        """Whether the least share of a row is above the greatest of all others."""
        ours = self.shares(name, length, measure)
        others = [share for row in self.rows if row != name for share in self.shares(row, length, measure)]
        return min(ours) > max(others) if ours and others else False

    def reference(self, name: str, measure: str) -> list[float]:
        """Returns the values of nothing or of the full context, one for each seed."""
        return [record["rows"][name][measure] for record in self.references.values()]

    def values(self, name: str, length: int, measure: str) -> list[float]:
        """Returns the values of a row, one for each seed."""
        return [row[measure] for _, row in self._found(name, length)]

    def shares(self, name: str, length: int, measure: str) -> list[float]:
        """Returns the recovered shares of a row, one for each seed."""
        shares = []
        for seed, row in self._found(name, length):
            rows = self.references[seed]["rows"]
            nothing, full = rows["nothing"][measure], rows["full context"][measure]
            shares.append((row[measure] - nothing) / (full - nothing))
        return shares

    def _found(self, name: str, length: int) -> list[tuple[int, Record]]:
        return [
            (record["seed"], record["rows"][name])
            for record in self.records
            if record["length"] == length and name in record["rows"]
        ]


def spread(values: Sequence[float], digits: int) -> str:
    """Returns the mean, with the least and the greatest if they differ; an empty text for no values."""
    if not values:
        return ""
    mean, low, high = (f"{value:,.{digits}f}" for value in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"
