"""`prefix-ext`: one module per command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft_prefix_ext import __version__
from peft_prefix_ext.cli import chat, compile, compose, distill, evaluate, export, import_, inspect, run, train, verify
from peft_prefix_ext.cli.common import EXIT_CODES, refuse

COMMANDS = (train, evaluate, chat, inspect, verify, export, import_, compose, compile, distill, run)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Exits with 1 if it was refused and with 2 for wrong usage.

    Args:
        argv: The arguments; those of this process by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Not parsed here: argparse would take options of the program for its own.
    if words[:1] == ["run"] and words[1:] and words[1] not in ("-h", "--help"):
        run.run(argparse.Namespace(program=words[1:]))
        return
    if words[:1] == [train.COMMAND] and not {"-h", "--help"} & {*words}:
        with _own_warnings_only():
            train.run_words(words[1:])  # which knows TRL's options as well
        return
    args = _parser().parse_args(words)
    try:
        with _own_warnings_only():
            args.run(args)
    except (ValueError, OSError) as error:
        refuse(args.command, error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefix-ext",
        description="Trains, measures, inspects, converts and composes prefix adapters, ours (PREFIX_EXT) and stock PEFT's\n"
        "(PREFIX_TUNING, CARTRIDGE), and runs other programs that load them.",
        epilog=f"Run `prefix-ext COMMAND --help` for examples. Only safetensors files are read.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"prefix-ext {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


@contextmanager
def _own_warnings_only() -> Iterator[None]:
    """Prints each warning of this package on one line, and hides the warnings and logs of other libraries."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", module=r"peft_prefix_ext\.")
            warnings.showwarning = _show_warning
            yield
    finally:
        logging.disable(disabled)


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    print(f"prefix-ext: warning: {message}", file=sys.stderr)
