"""The command line that the benchmarks share: where results are, and where reports go."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.docs_pages import DOCS, write_generated_part
from benchmarks.common.results import RESULTS


def make_parser(name: str, description: str | None) -> ArgumentParser:
    return ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=description, formatter_class=RawDescriptionHelpFormatter
    )


def add_output_options(parser: ArgumentParser, name: str, page: str, results: str | None = None) -> None:
    """Adds `--results`, `--report` and `--page`.

    Args:
        name: The benchmark.
        page: The file in `docs/benchmarks/` that has its report.
        results: The results file in `benchmarks/results/`; by default it has the name of the benchmark.
    """
    results = results or f"{name}.json"
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS / results,
        help=f"results file, read and written (default: benchmarks/results/{results})",
    )
    parser.add_argument("--report", action="store_true", help="measure nothing; write the report from the results file")
    parser.add_argument(
        "--page",
        "--readme",
        type=Path,
        help="Markdown file to write the report into, between its markers; "
        f"--report on the default results file writes docs/benchmarks/{page}",
    )
    parser.set_defaults(default_page=DOCS / page, default_results=RESULTS / results)


def page_to_write(options: Namespace) -> Path | None:
    """Returns the page that gets the report, if any: the results of others must not end up in the documentation."""
    if options.page is None and options.report and options.results == options.default_results:
        return Path(options.default_page)
    return options.page


def run(
    parser: ArgumentParser,
    name: str,
    measure: Callable[[Namespace], dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
    arguments: list[str] | None = None,
) -> None:
    """Runs a benchmark whose results are one JSON object: measures or reads it, then prints its report.

    Args:
        parser: Holds the benchmark's own options.
        name: The benchmark.
        measure: Returns the results; `options.short` asks for a shorter run.
        report: Returns the report in Markdown.
    """
    parser.add_argument("--short", action="store_true", help="measure less, in less time")
    add_output_options(parser, name, "overhead.md")
    options = parser.parse_args(arguments)
    if options.report:
        found = json.loads(options.results.read_text(encoding="utf-8"))
    else:
        found = measure(options)
        options.results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    text = report(found)
    page = page_to_write(options)
    if page is not None:
        write_generated_part(page, name, text)
    print(text)
