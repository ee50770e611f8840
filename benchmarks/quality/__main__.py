"""Trains every method on the E2E challenge under one budget, and scores the generated text.

    python -m benchmarks.quality E2E_FOLDER --model SmolLM2-135M-Instruct   # make the runs that have no result yet
    python -m benchmarks.quality E2E_FOLDER --model ... --vary              # ablations of the first method
    python -m benchmarks.quality E2E_FOLDER --model ... --rates             # held-out loss by learning rate, in rates.json
    python -m benchmarks.quality --report                                   # tables and plots from the results

E2E_FOLDER holds the challenge's `devset.csv` (for training) and `testset_w_refs.csv` (for scoring). Runs on the whole
training set come first, and all methods are run with one seed before the next. Each run is saved as soon as it is done; an
interrupted benchmark resumes.

Each method chooses its learning rate by the loss on held-out rows of `devset.csv`, with 200 rows and seed 0. All methods
see the same rows in the same order.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common.cli import add_output_options, make_parser, page_to_write
from benchmarks.quality.benchmark import Benchmark, Settings
from benchmarks.quality.methods import METHODS
from benchmarks.quality.rates import RATES_NAME, run_rates
from benchmarks.quality.report import write_report


def main(arguments: list[str] | None = None) -> int:
    options = parse_args(arguments)
    if options.data is not None:
        torch.set_num_threads(options.threads)
        settings = Settings(model=options.model)
        if options.rates:
            run_rates(
                options.data,
                replace(settings, dtype="float32", attention="sdpa"),
                options.results.with_name(RATES_NAME),
            )
        elif options.vary:
            Benchmark(options.data, settings, options.results).run_variants(METHODS[0])
        else:
            benchmark = Benchmark(options.data, settings, options.results)
            benchmark.run([method for method in METHODS if options.only in method.name])
    if options.report:
        print(write_report(options.results, METHODS, page_to_write(options)))
    return 0


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser("quality", __doc__)
    parser.add_argument(
        "data", type=Path, nargs="?", help="folder of the E2E challenge's CSV files; omit to only report"
    )
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or folder")
    parser.add_argument("--only", default="", help="only methods whose name contains this, such as lora")
    parser.add_argument("--rates", action="store_true", help="instead, the held-out loss by learning rate")
    parser.add_argument("--vary", action="store_true", help="instead, change one option of the first method at a time")
    parser.add_argument("--threads", type=int, default=1, help="number of torch threads (default: 1)")
    add_output_options(parser, "quality", "quality.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
