"""The command line that the steps share."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path


def parser_of(name: str, description: str | None) -> ArgumentParser:
    """Returns a parser with `--out` and `--dry-run`.

    Args:
        name: The step.
        description: What it does.
    """
    parser = ArgumentParser(
        prog=f"python -m benchmarks.gpu.steps.{name}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the result, as JSON")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, as small as can be")
    return parser


def device_of(options: Namespace) -> str:
    """Returns the device of a step."""
    return "cpu" if options.dry_run else "cuda"
