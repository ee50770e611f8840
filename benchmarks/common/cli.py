"""The command line of a benchmark that measures all it has in one go: its results are one JSON object."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.docs_pages import README, put


def run(
    parser: ArgumentParser,
    name: str,
    measure: Callable[[Namespace], dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
    arguments: list[str] | None = None,
) -> None:
    """Measures, writes the results and prints the report; or puts the report on earlier results into the README.

    Args:
        parser: With what options the benchmark has of its own.
        name: Of the benchmark.
        measure: Returns the results under these options, of which `short` asks for less.
        report: Returns the README's part.
    """
    results = Path(__file__).parents[1] / "results" / f"{name}.json"
    parser.add_argument("--short", action="store_true", help="less of it")
    parser.add_argument("--results", type=Path, default=results, help="where they go, and where --report finds them")
    parser.add_argument("--report", action="store_true", help="write the README's table from the results there are")
    options = parser.parse_args(arguments)
    if options.report:
        put(README, name, report(json.loads(options.results.read_text(encoding="utf-8"))))
        return
    found = measure(options)
    options.results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(report(found))
