"""Measures startup, first requests, run-time loading and memory of a server with many adapters.

    python -m benchmarks.cold_start             # SmolLM2, three starts of each server
    python -m benchmarks.cold_start --short     # one start of each: two minutes on 2 cores
    python -m benchmarks.cold_start --report    # table from the results

Starts real servers with 0, 10 and 1,000 adapters of random weights, and one that finds 10,000 in a folder. Sends requests to the
last two. Their KV cache is small, and full before memory is measured, so that only the plugin's memory grows afterwards.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.cold_start.benchmark import MODEL, Settings, measure, short
from benchmarks.cold_start.report import report
from benchmarks.common.cli import make_parser, run


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("cold_start", __doc__)
    parser.add_argument("--model", default=MODEL, help="Hub id or folder")
    run(parser, "cold_start", measured, report, arguments)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    settings = Settings(model=options.model)
    return measure(short(settings) if options.short else settings)


if __name__ == "__main__":
    main()
