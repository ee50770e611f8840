"""The results as a table."""

from __future__ import annotations

from typing import Any

from benchmarks.cold_start.benchmark import FOLDER
from benchmarks.common.machine import describe
from benchmarks.common.tables import format_spread, markdown_table


def report(found: dict[str, Any]) -> str:
    """Returns the report in Markdown."""
    settings, start, first = found["settings"], found["start"], found["first request"]
    fewest, *others = sorted(start, key=int)
    folder = found.get(FOLDER)
    rows = [
        ["start to the first answer, without adapters", f"{start[fewest]['seconds']['median']:.1f} s"],
        *([f"more with {int(number):,} adapters", _cost(start[number]["more"], "s")] for number in others),
        ["first request to an adapter, more than the second", _cost(first["more"], "ms")],
        [f"loading an adapter of {settings['loaded_tokens']} tokens at run time", _cost(found["load"], "ms")],
        ["memory of a registered adapter", f"{found['bytes per registered adapter'] / 2**10:.1f} KiB"],
        ["memory of a resident adapter", f"{found['bytes per resident adapter'] / 2**10:.0f} KiB"],
        ["files of an adapter", f"{found['file bytes'] / 2**10:.0f} KiB"],
    ]
    if folder is not None:
        more = [f"more with {settings['in_folder']:,} adapters in a folder", _cost(folder["start"]["more"], "s")]
        rows.insert(1 + len(others), more)
        cost = _cost(folder["first request"]["more"], "ms")
        rows.insert(3 + len(others), ["first request to an adapter in the folder, more than the second", cost])
    return (
        f"{settings['model']}, adapters of {settings['tokens']} tokens; median (quartiles).\n\n"
        f"{markdown_table(['what', 'cost'], rows)}\n\n{describe(found['machine'])}"
    )


def _cost(found: dict[str, Any], unit: str) -> str:
    return format_spread(found, 1, unit)
