"""What several commands share: their arguments, the base model, errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peft_prefix_ext.checkpoint.format import PrefixCheckpoint

EXIT_CODES = "exit codes: 0 success; 1 refused, with the reason on stderr; 2 wrong usage"
PATH = "a local folder, or owner/name[/folder][@revision] on the Hub"
DTYPES = ("float32", "bfloat16", "float16", "auto")


def add_command(
    subparsers: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    *,
    summary: str,
    description: str,
    examples: str,
    exit_codes: str = EXIT_CODES,
) -> argparse.ArgumentParser:
    """Adds the parser of a command, which `args.run` runs; `args.parser` reports wrong usage."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}\n\n{exit_codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH_OR_REPO", help=f"the adapter: {PATH}")


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="the folder to write to")


def add_base(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--base", metavar="MODEL", required=required, help="the base model: a local folder, or a repository on the Hub"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="the dtype to load the base model in (default: %(default)s, which is exact)",
    )


def load_base(args: argparse.Namespace) -> PreTrainedModel:
    """Loads the model of `add_base`.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        is_decoder_only = not AutoConfig.from_pretrained(args.base).is_encoder_decoder
        auto_class: Any = AutoModelForCausalLM if is_decoder_only else AutoModelForSeq2SeqLM
        return auto_class.from_pretrained(args.base, dtype=args.dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The base model {args.base!r} cannot be loaded: {reason}") from error


def print_summary(prefix: PrefixCheckpoint) -> None:
    from peft_prefix_ext.checkpoint.summary import as_text

    print(as_text(prefix))


def refuse(command: str, error: Exception) -> NoReturn:
    """Prints an error as one sentence and exits with 1."""
    # Errors of this package are one line; of other libraries' errors the first line is enough.
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    print(f"prefix-ext {command}: error: {reason}", file=sys.stderr)
    sys.exit(1)
