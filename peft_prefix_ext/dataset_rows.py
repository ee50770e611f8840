"""Iterates over the rows of a dataset: a list, `datasets`, pandas, polars or Arrow, none of which is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

# How to iterate over the rows of tables whose own iterator does not, by a method that identifies the library.
_BY_ROW: dict[str, Callable[[Any], Iterable[Any]]] = {
    "iterrows": lambda frame: (row.to_dict() for _, row in frame.iterrows()),  # pandas
    "iter_rows": lambda frame: frame.iter_rows(named=True),  # polars
    "to_batches": lambda table: (row for batch in table.to_batches() for row in batch.to_pylist()),  # Arrow
}


def are_rows(source: Any) -> bool:
    """Whether `source` holds rows, and not a text, or splits or columns by name."""
    return not isinstance(source, (str, dict)) and (isinstance(source, Iterable) or _method(source) is not None)


def iter_rows(source: Any) -> Iterator[Any]:
    """Yields the rows; those of tables as dicts without missing values.

    A concatenated dataset has None for the columns that a row lacks, and pandas NaN.
    """
    method = _method(source)
    for row in source if method is None else _BY_ROW[method](source):
        yield (
            {name: _plain(value) for name, value in row.items() if not _is_missing(value)}
            if isinstance(row, dict)
            else row
        )


def _method(source: Any) -> str | None:
    return next((name for name in _BY_ROW if hasattr(source, name)), None)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ == "NAType"


def _plain(value: Any) -> Any:
    # Parquet returns lists as arrays.
    return value.tolist() if hasattr(value, "tolist") else value
