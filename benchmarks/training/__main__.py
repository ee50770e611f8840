"""Measures time and memory of one training step of each method, interleaved.

    python -m benchmarks.training                                         # all cells; resumes if interrupted
    python -m benchmarks.training --short --results short.json
    python -m benchmarks.training --shape 3B --length 512 --results 3b.json
    python -m benchmarks.training --report                                # tables and plot from the results

A cell is a batch size and a number of virtual tokens. In each cell, all methods train the same batch on one copy of the
weights: once per round, in a new random order. Results are ratios within rounds, to the frozen model (its forward pass and
the gradient of its input, the limit for any method) and to stock PEFT.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.common.cli import add_output_options, make_parser, page_to_write
from benchmarks.common.shapes import SHAPES
from benchmarks.training.benchmark import SHORT, Benchmark, Settings
from benchmarks.training.report import write_report


def main(arguments: list[str] | None = None) -> int:
    options = parse_args(arguments)
    if not options.report:
        torch.set_num_threads(options.threads)
        changes = {name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__}
        settings = Settings(**{**changes, **(SHORT if options.short else {})})
        Benchmark(settings, options.results).run()
    print(write_report(options.results, page_to_write(options)))
    return 0


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser("training", __doc__)
    has_gpu = torch.cuda.is_available()
    default = Settings("HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--model", default=default.model, help="Hub id or folder")
    parser.add_argument("--shape", dest="model", choices=sorted(SHAPES), help="instead of --model: random weights")
    parser.add_argument("--layers", type=int, help="use only the first layers (default: all)")
    parser.add_argument("--batches", type=int, nargs="+", default=default.batches, help="batch sizes (default: 1 4 16)")
    parser.add_argument(
        "--prefixes", type=int, nargs="+", default=default.prefixes, help="virtual tokens (default: 16 128 1024)"
    )
    parser.add_argument("--length", type=int, default=default.length, help="tokens per row, no padding (default: 64)")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="rounds after the warm-up (default: 5)")
    parser.add_argument(
        "--dtype", default="bfloat16" if has_gpu else default.dtype, help="default: bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--device", default="cuda" if has_gpu else default.device, help="default: cuda if available")
    parser.add_argument("--threads", type=int, default=default.threads, help="number of torch threads (default: 2)")
    parser.add_argument("--attention", help="attn_implementation, such as flash_attention_2 (default: transformers')")
    parser.add_argument("--compiled", action="store_true", help="run the model by torch.compile")
    parser.add_argument(
        "--short", action="store_true", help="a few minutes: 4 layers, batch sizes 1 and 16, prefixes of 16 and 1024"
    )
    add_output_options(parser, "training", "training.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
