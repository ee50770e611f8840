"""Checks kernels and answers, and measures serving and training, on an NVIDIA GPU.

    python -m benchmarks.gpu                                     # everything; resumes if interrupted
    python -m benchmarks.gpu --list                              # the steps
    python -m benchmarks.gpu --steps kernels "float32 llama"     # some of them
    python -m benchmarks.gpu --budget 600                        # as many as fit into ten minutes, the most telling first
    python -m benchmarks.gpu --dry-run --results dry.json        # on a CPU, as small as can be: does it run?
    python -m benchmarks.gpu --report                            # tables and plots from the results

All models have random weights, so nothing is downloaded. Every step is a process of its own. The exit status is 0 if all
steps are done, but for those that cannot run here.
"""

from __future__ import annotations

import sys
from argparse import Namespace

import torch

from benchmarks.common.cli import add_output_options, make_parser, page_to_write
from benchmarks.common.results import ResultsFile
from benchmarks.gpu.plan import Step, plan
from benchmarks.gpu.run_steps import run_steps

NO_GPU = "There is no CUDA device here; --dry-run runs what a CPU can."


def main(arguments: list[str] | None = None) -> int:
    options = parse_args(arguments)
    steps = chosen(options)
    if options.list:
        print("\n".join(f"{step.name:40} {step.seconds:4} s" for step in steps))
        return 0
    done = True
    if not options.report:
        if not (options.dry_run or torch.cuda.is_available()):
            print(NO_GPU, file=sys.stderr)
            return 2
        options.results.parent.mkdir(parents=True, exist_ok=True)
        results = ResultsFile(options.results, {"dry_run": options.dry_run})
        done = run_steps(steps, results, options.dry_run, options.budget)
    try:
        from benchmarks.gpu.report import write_report
    except ImportError as error:
        # Such as matplotlib. The results count, and `--report` can be run elsewhere.
        print(f"{options.results} is written; its report needs {error.name}.", file=sys.stderr)
        return 0 if done else 1
    print(write_report(options.results, page_to_write(options)))
    return 0 if done else 1


def chosen(options: Namespace) -> list[Step]:
    """Returns the steps to run: those that are named, in this order, or all.

    Raises:
        SystemExit: If there is no step of a name.
    """
    steps = {step.name: step for step in plan(options.dry_run)}
    if options.steps is None:
        return [step for step in steps.values() if step.by_default or options.list]
    if unknown := [name for name in options.steps if name not in steps]:
        sys.exit(f"There is no step {', '.join(map(repr, unknown))}; --list shows all.")
    return [steps[name] for name in options.steps]


def parse_args(arguments: list[str] | None) -> Namespace:
    parser = make_parser("gpu", __doc__)
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these, in this order (default: all)")
    parser.add_argument("--list", action="store_true", help="show the steps and about how long they take")
    parser.add_argument("--budget", type=float, help="seconds for all steps, each of which then has its own limit, too")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, what needs no CUDA")
    add_output_options(parser, "gpu", "gpu.md", "gpu/gpu.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
