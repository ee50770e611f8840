"""What several commands share: their arguments, the base model, errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_prefix_ext.checkpoint.format import PrefixCheckpoint
    from peft_prefix_ext.distillation.context import Context

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


def add_adapter(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    add_base(parser, required=False)


def load_adapter(args: argparse.Namespace) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Loads the adapter of `add_adapter` on its base model, and the tokenizer, with the chat template that goes on behind it.

    Raises:
        ValueError: If one of them cannot be loaded.
    """
    import torch
    from peft import PeftModel

    from peft_prefix_ext.checkpoint.hub import resolve
    from peft_prefix_ext.checkpoint.reader import read_prefix

    prefix = read_prefix(resolve(args.path))
    args.base = args.base or prefix.base_model_name_or_path
    if not args.base:
        raise ValueError(f"{args.path} does not say what its base model is: give --base MODEL.")
    tokenizer = _load_tokenizer(args.base, "--base")
    if prefix.chat_template is not None:  # it stands for the opening of a chat, which must not come twice
        tokenizer.chat_template = prefix.chat_template
    base = load_base(args)
    if torch.accelerator.is_available():
        base.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    return PeftModel.from_pretrained(base, str(prefix.path)).eval(), tokenizer


def add_context(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="text files, or one .json file with messages")
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="where to load the tokenizer from (default: the base model)"
    )


def load_context(args: argparse.Namespace, *, chat: bool) -> tuple[PreTrainedTokenizerBase, Context]:
    """Returns the tokenizer and the context of `add_context`.

    Args:
        args: The arguments, with those of `add_base`.
        chat: Whether text files are the system message of a chat. A file of messages is a chat in any case.

    Raises:
        ValueError: If they cannot be read.
    """
    from peft_prefix_ext.distillation.context import SEPARATOR, chat_context, read_messages, read_text, text_context

    files = [source for source in args.sources if source.endswith(".json")]
    if files and (getattr(args, "system", False) or len(args.sources) > 1):
        args.parser.error("a .json file is a whole chat: give it alone, without --system")
    tokenizer = _load_tokenizer(args.tokenizer or args.base)
    texts = [read_text(path) for path in args.sources]
    if not files and not chat:
        return tokenizer, text_context(tokenizer, texts, args.sources)
    messages = read_messages(files[0]) if files else [{"role": "system", "content": SEPARATOR.join(texts)}]
    return tokenizer, chat_context(tokenizer, messages, dict(zip(args.sources, texts, strict=True)))


def _load_tokenizer(source: str, option: str = "--tokenizer") -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
        return tokenizer
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no tokenizer at {source!r}; give {option} MODEL.") from error


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
    print(f"prefix-ext {command}: error: {first_line(error)}", file=sys.stderr)
    sys.exit(1)


def first_line(error: Exception) -> str:
    """Returns what an error says: those of this package are one line, of those of other libraries the first is enough."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
