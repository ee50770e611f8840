"""Measures throughput and latency of serving prefixes, against cached text, the base model, LoRA and transformers.

    python -m benchmarks.serving                        # SmolLM2, all comparisons: one to two hours on 2 cores
    python -m benchmarks.serving --short                # some comparisons: ten minutes
    python -m benchmarks.serving --shape 8B --rounds 7  # random weights in the shape of a model, for a GPU
    python -m benchmarks.serving --report               # table and plot from the results

Engines run in processes of their own and take turns. All requests of a measurement are sent at once; they have new random
prompts of one length, and all answers have one length. Each comparison is saved as soon as it is done; an interrupted
benchmark resumes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.common.cli import add_output_options, make_parser, page_to_write
from benchmarks.common.results import ResultsFile
from benchmarks.common.shapes import SERVED_SHAPES, write_shape
from benchmarks.serving.benchmark import Benchmark
from benchmarks.serving.comparisons import SHORT, TRANSPORTS, Settings
from benchmarks.serving.report import write_report


def main(arguments: list[str] | None = None) -> int:
    options = parse_args(arguments)
    if not options.report:
        changes = {
            name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__ and value
        }
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if options.shape:
                changes |= {"model": str(write_shape(folder / options.shape, options.shape)), "load_format": "dummy"}
            settings = Settings(**{**(SHORT if options.short else {}), **changes})
            results = ResultsFile(options.results, settings.record())
            Benchmark(settings, results, folder, options.comparisons).run(options.transports)
    print(write_report(options.results, page_to_write(options)))
    return 0


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser("serving", __doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or folder")
    parser.add_argument(
        "--shape", choices=sorted(SERVED_SHAPES), help="instead of --model: random weights in this shape"
    )
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS, help="default: all")
    parser.add_argument("--comparisons", nargs="+", help='such as base lengths mixes "LoRA, 8" (default: all)')
    parser.add_argument("--short", action="store_true", help="fewer comparisons, requests and rounds")
    for name, field in Settings.__dataclass_fields__.items():
        if isinstance(field.default, int) and not isinstance(field.default, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {field.default}")
    for name in ("lengths", "mixes", "loras", "ranks"):
        default = " ".join(map(str, getattr(Settings, name)))
        parser.add_argument(f"--{name}", type=int, nargs="+", help=f"default: {default}")
    parser.add_argument("--dtype", help="default: bfloat16")
    add_output_options(parser, "serving", "serving.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
