"""`prefix-ext`: looks into prefix adapters, checks them, and moves them between formats."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_prefix_ext import __version__

if TYPE_CHECKING:
    from peft_prefix_ext.checkpoint import PrefixCheckpoint

EXIT_CODES = "exit codes: 0 it is right, or was written; 1 it was refused, for the reason on stderr; 2 wrong usage"
PATH = "a folder, or one on the Hub as owner/name[/folder][@revision]"
DTYPES = ("float32", "bfloat16", "float16", "auto")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 if all is right, 1 if something was refused, 2 for wrong usage.

    Args:
        argv: The arguments; those of this process by default.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if getattr(arguments, "positions", None) == "shift" and not arguments.base:
        parser.error("--positions shift needs --base MODEL: how its keys turn is measured on it")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            arguments.run(arguments)
    except (ValueError, OSError) as error:
        # Of this package's own errors all, of the libraries' the first line, is one sentence.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(f"prefix-ext {arguments.command}: error: {reason}", file=sys.stderr)
        sys.exit(1)


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    print(f"prefix-ext: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefix-ext",
        description="Looks into prefix adapters, checks them, and moves them between formats: ours (PREFIX_EXT)\n"
        "and stock PEFT's (PREFIX_TUNING, CARTRIDGE).",
        epilog=f"`prefix-ext COMMAND --help` has examples. Only safetensors is ever read.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"prefix-ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Any, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    inspect = command(
        "inspect",
        _inspect,
        "say what an adapter is",
        "Reads and checks an adapter of any of the three types, and says what it is. Needs no base model.",
        "  prefix-ext inspect ./describe\n  prefix-ext inspect user/repo@v2 --json | jq .num_virtual_tokens",
    )
    inspect.add_argument("--json", action="store_true", help="print it as JSON, layer by layer")

    verify = command(
        "verify",
        _verify,
        "check an adapter against its base model",
        "Loads the base model and the adapter, and checks what a server would rely on: the file, that the base is the one\n"
        "it was trained on, that the model uses exactly the K/V on disk, and that they change its logits, to finite ones.",
        "  prefix-ext verify ./describe --base HuggingFaceTB/SmolLM2-135M-Instruct",
    )

    export = command(
        "export",
        _export,
        "write it for stock PEFT",
        "Writes an adapter that stock PEFT loads without this package, with equal logits. Stock PEFT has one K/V shape for\n"
        "all layers: a prefix with several (Gemma 4, MLA, hybrid models) is refused.",
        "  prefix-ext export ./describe ./describe-peft\n  prefix-ext export ./describe ./cartridge --type CARTRIDGE",
    )
    export.add_argument(
        "--type",
        choices=("PREFIX_TUNING", "CARTRIDGE"),
        default="PREFIX_TUNING",
        help="PEFT's type (default: %(default)s)",
    )
    export.add_argument(
        "--task-type", metavar="TYPE", help="PEFT's task type, such as CAUSAL_LM, if the adapter has none"
    )

    import_ = command(
        "import",
        _import,
        "write a stock PEFT prefix as ours",
        "Writes a stock PREFIX_TUNING or CARTRIDGE adapter as a PREFIX_EXT one, with equal logits, to go on training it or\n"
        "to use it where stock PEFT fails: gradient checkpointing, static caches, padded batches with sliding windows.",
        "  prefix-ext import ./stock ./ours --base HuggingFaceTB/SmolLM2-135M-Instruct",
    )

    compose = command(
        "compose",
        _compose,
        "put prefixes behind one another",
        "Concatenates prefixes of one base model, in this order; real tokens start behind all of them.\n"
        "  keep   each prefix's keys stay those of positions 0.., as in Cartridges: no base model is needed\n"
        "  shift  each prefix's keys are turned to stand behind the ones before it, as if its tokens had been read there;\n"
        "         how keys turn is measured on the base model, and refused where it has learned absolute positions",
        "  prefix-ext compose ./facts ./style --out ./both\n"
        "  prefix-ext compose ./facts ./style --out ./both --positions shift --base HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    compose.add_argument("paths", metavar="PATH_OR_REPO", nargs="+", help=PATH)
    compose.add_argument("--out", required=True, help="the folder to write")
    compose.add_argument("--positions", choices=("keep", "shift"), default="keep", help="default: %(default)s")

    for parser_of in (inspect, verify, export, import_):
        parser_of.add_argument("path", metavar="PATH_OR_REPO", help=PATH)
    for parser_of in (export, import_):
        parser_of.add_argument("out", metavar="OUT", help="the folder to write")
    for parser_of, required in ((verify, True), (import_, True), (compose, False)):
        parser_of.add_argument(
            "--base", metavar="MODEL", required=required, help="the base model: a folder, or a repository on the Hub"
        )
        parser_of.add_argument(
            "--dtype",
            choices=DTYPES,
            default="float32",
            help="how to load the base model (default: %(default)s, exact)",
        )
    return parser


def _inspect(arguments: argparse.Namespace) -> None:
    from peft_prefix_ext.checkpoint import read_prefix
    from peft_prefix_ext.hub import resolve
    from peft_prefix_ext.summary import as_dict, as_text

    prefix = read_prefix(resolve(arguments.path))
    print(json.dumps(as_dict(prefix), indent=2) if arguments.json else as_text(prefix))


def _verify(arguments: argparse.Namespace) -> None:
    from peft_prefix_ext.verification import verify

    for finding in verify(arguments.path, _load_base(arguments)):
        print(f"ok  {finding}", flush=True)


def _export(arguments: argparse.Namespace) -> None:
    from peft_prefix_ext.interop import export_to_peft

    _wrote(export_to_peft(arguments.path, arguments.out, arguments.type, task_type=arguments.task_type))


def _import(arguments: argparse.Namespace) -> None:
    from peft_prefix_ext.interop import import_from_peft, read_source

    read_source(arguments.path)  # what is wrong with it is said before a model is loaded
    _wrote(import_from_peft(arguments.path, arguments.out, _load_base(arguments)))


def _compose(arguments: argparse.Namespace) -> None:
    from peft_prefix_ext.composition import compose

    base = _load_base(arguments) if arguments.base else None
    _wrote(compose(arguments.paths, arguments.out, arguments.positions, base))


def _wrote(prefix: PrefixCheckpoint) -> None:
    from peft_prefix_ext.summary import as_text

    print(as_text(prefix))


def _load_base(arguments: argparse.Namespace) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    # What it has to say while it loads is not what was asked for.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        writes_only = not AutoConfig.from_pretrained(arguments.base).is_encoder_decoder
        auto_class: Any = AutoModelForCausalLM if writes_only else AutoModelForSeq2SeqLM
        return auto_class.from_pretrained(arguments.base, dtype=arguments.dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The base model {arguments.base!r} cannot be loaded: {reason}") from error
