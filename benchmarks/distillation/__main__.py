"""Measures distilled prefixes: what they keep of their context, beside what else is as short, and what they cost.

    python -m benchmarks.distillation                                  # all tasks; resumes if interrupted
    python -m benchmarks.distillation --tasks many-shot --seeds 0
    python -m benchmarks.distillation --short --results short.json     # to see that everything runs
    python -m benchmarks.distillation --report                         # tables and plot from the results

    many-shot   16 worked examples of E2E into 64 tokens, without labels: BLEU
    documents   a fact sheet and a page of the manual into 16 to 256 tokens, beside parts, a summary, next-token training
    together    1, 2 and 4 prefixes behind one another, distilled apart and with the others
    speed       throughput and time to first token on vLLM, against the context as text and in the cache
    step        a training step, against a plain one

`make demo` leaves E2E in `.demo/`. Each record is saved as soon as it is done, and so is each stage of a distillation, in the
folder `--work`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.common.cli import add_output_options, make_parser, page_to_write
from benchmarks.common.results import ResultsFile
from benchmarks.distillation.bench import Bench
from benchmarks.distillation.report import write_report
from benchmarks.distillation.settings import LENGTHS, SEEDS, SHORT, SHORT_LENGTHS, SHORT_SEEDS, TASKS, Settings
from benchmarks.distillation.tasks import documents, many_shot, speed, step, together


def main(arguments: list[str] | None = None) -> int:
    options = parse_args(arguments)
    if not options.report:
        measure(options)
    print(write_report(options.results, page_to_write(options)))
    return 0


def measure(options: argparse.Namespace) -> None:
    """Measures the tasks that were asked for."""
    torch.set_num_threads(options.threads)
    settings = Settings(options.model, **(SHORT if options.short else {}))
    seeds = options.seeds or (SHORT_SEEDS if options.short else SEEDS)
    lengths = options.lengths or (SHORT_LENGTHS if options.short else LENGTHS)
    work = options.work or Path(".bench") / options.results.stem
    bench = Bench(settings, ResultsFile(options.results, settings.record()), work, options.engine)
    runs = {
        "many-shot": lambda: many_shot.run(bench, options.e2e, seeds),
        "documents": lambda: documents.run(bench, options.documents, lengths, seeds),
        "together": lambda: together.run(bench, seeds),
        "speed": lambda: speed.run(bench),
        "step": lambda: step.run(bench),
    }
    for task in options.tasks:
        runs[task]()


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser("distillation", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: all")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or folder")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"default: {' '.join(map(str, SEEDS))}")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help=f"of the prefixes of documents (default: {' '.join(map(str, LENGTHS))})"
    )
    parser.add_argument(
        "--documents", nargs="+", choices=documents.DOCUMENTS, default=documents.DOCUMENTS, help="default: both"
    )
    parser.add_argument("--e2e", type=Path, default=Path(".demo/e2e.json"), help="default: .demo/e2e.json")
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what answers the questions to train on (default: transformers)",
    )
    parser.add_argument(
        "--work", type=Path, help="work folders (default: .bench/NAME, by the name of the results file)"
    )
    parser.add_argument("--threads", type=int, default=2, help="number of torch threads (default: 2)")
    parser.add_argument("--short", action="store_true", help="one seed, few questions and steps")
    add_output_options(parser, "distillation", "distillation.md")
    options = parser.parse_args(arguments)
    if not options.report and "many-shot" in options.tasks and not options.e2e.is_file():
        parser.error(f"{options.e2e} is not there: run `make demo`, which leaves it, or name it with --e2e.")
    return options


if __name__ == "__main__":
    sys.exit(main())
