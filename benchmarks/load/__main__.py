"""Runs many concurrent clients on a real server while adapters are replaced, unloaded and loaded, and checks every answer.

    python -m benchmarks.load                              # tiny random model, 20 adapters, 64 clients, 5 minutes
    python -m benchmarks.load --seconds 60 --clients 8
    python -m benchmarks.load --folder                     # the server finds the adapters in a folder, which changes
    python -m benchmarks.load --option=--api-server-count=2 --option=--data-parallel-size=2
    python -m benchmarks.load --model MODEL_FOLDER --adapter a=FOLDER_A --adapter b=FOLDER_B --adapter c=FOLDER_C

The expected answers are those of the idle server, one request at a time; for the tiny model they must be those of transformers.
Prints a JSON report. The exit status is 1 if an answer is wrong, if a status is neither 200 nor the 404 of an adapter that is
not loaded or the 400 of one that is being overwritten, or if the memory of a process grows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.common.cli import make_parser
from benchmarks.load.benchmark import run


def main(arguments: list[str] | None = None) -> int:
    report = run(parse_args(arguments))
    print(json.dumps(report, indent=2))
    return 0 if report["ok"] else 1


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser("load", __doc__)
    parser.add_argument("--model", type=Path, help="folder of a model (default: a tiny random one)")
    parser.add_argument(
        "--adapter",
        metavar="NAME=FOLDER",
        type=lambda text: tuple(text.split("=", 1)),
        action="append",
        default=[],
        help="an adapter of --model; at least three",
    )
    parser.add_argument("--adapters", type=int, default=20, help="number of adapters of the tiny model (default: 20)")
    parser.add_argument("--clients", type=int, default=64, help="concurrent clients (default: 64)")
    parser.add_argument("--seconds", type=float, default=300.0, help="duration (default: 300)")
    parser.add_argument("--blocks", type=int, default=256, help="KV cache blocks of 32 tokens (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests and changes (default: 0)")
    parser.add_argument(
        "--folder", action="store_true", help="the server finds all adapters in a folder, which changes"
    )
    parser.add_argument("--option", action="append", default=[], help="an option of the server")
    options = parser.parse_args(arguments)
    if options.model is not None and len(options.adapter) < 3:
        parser.error(f"--model needs at least three --adapter, got {len(options.adapter)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
