"""The rows of a data set, whatever holds it: a list, `datasets`, pandas, polars or Arrow, none of which is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

# How tables that iterate over their columns, or not at all, give their rows; by the method that tells them apart.
_BY_ROW: dict[str, Callable[[Any], Iterable[Any]]] = {
    "iterrows": lambda frame: (row.to_dict() for _, row in frame.iterrows()),  # pandas
    "iter_rows": lambda frame: frame.iter_rows(named=True),  # polars
    "to_batches": lambda table: (row for batch in table.to_batches() for row in batch.to_pylist()),  # Arrow
}


def are_records(source: Any) -> bool:
    """Whether these are rows, and not a text, or several splits or columns by name."""
    return not isinstance(source, (str, dict)) and (isinstance(source, Iterable) or _method(source) is not None)


def records(source: Any) -> Iterator[Any]:
    """Yields the rows one by one, those of tables as dicts of the columns that they have.

    Where data sets are put together, a column that a row has not is None; pandas makes that NaN.
    """
    method = _method(source)
    for row in source if method is None else _BY_ROW[method](source):
        yield (
            {name: _plain(value) for name, value in row.items() if not _absent(value)} if isinstance(row, dict) else row
        )


def _method(source: Any) -> str | None:
    return next((name for name in _BY_ROW if hasattr(source, name)), None)


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ == "NAType"


def _plain(value: Any) -> Any:
    # Lists come out of Parquet as arrays.
    return value.tolist() if hasattr(value, "tolist") else value
