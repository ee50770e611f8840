"""`prefix-ext`: looks into prefix adapters, checks them, moves them between formats, and runs what loads them."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft_prefix_ext import __version__

if TYPE_CHECKING:
    from peft_prefix_ext.checkpoint.format import PrefixCheckpoint

EXIT_CODES = "exit codes: 0 it is right, or was written; 1 it was refused, for the reason on stderr; 2 wrong usage"
PATH = "a folder, or one on the Hub as owner/name[/folder][@revision]"
DTYPES = ("float32", "bfloat16", "float16", "auto")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 if all is right, 1 if something was refused, 2 for wrong usage.

    Args:
        argv: The arguments; those of this process by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Not by the parser, which would take the program's options for its own.
    if words[:1] == ["run"] and words[1:] and words[1] not in ("-h", "--help"):
        _run(words[1:])
        return
    parser = _parser()
    arguments = parser.parse_args(words)
    if getattr(arguments, "positions", None) == "shift" and not arguments.base:
        parser.error("--positions shift needs --base MODEL: how its keys turn is measured on it")
    try:
        with _own_warnings_only():
            arguments.run(arguments)
    except (ValueError, OSError) as error:
        _refuse(arguments.command, error)


def _refuse(command: str, error: Exception) -> None:
    # Of this package's own errors all, of the libraries' the first line, is one sentence.
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    print(f"prefix-ext {command}: error: {reason}", file=sys.stderr)
    sys.exit(1)


@contextmanager
def _own_warnings_only() -> Iterator[None]:
    """Prints warnings of this package as one line each, and none of what other libraries say while they are imported."""
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


def _run(words: Sequence[str]) -> None:
    from peft_prefix_ext.cli.run import find_program

    try:
        program = find_program(words)
    except ValueError as error:
        _refuse("run", error)
    else:
        program()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefix-ext",
        description="Looks into prefix adapters, checks them, moves them between formats, ours (PREFIX_EXT) and stock\n"
        "PEFT's (PREFIX_TUNING, CARTRIDGE), and runs other programs that load them.",
        epilog=f"`prefix-ext COMMAND --help` has examples. Only safetensors is ever read.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"prefix-ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: str, run: Any, summary: str, description: str, examples: str, exit_codes: str = EXIT_CODES
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=f"examples:\n{examples}\n\n{exit_codes}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    inspect = command(
        "inspect",
        _inspect,
        "say what an adapter is",
        "Reads and checks an adapter of any of the three types, and says what it is. Needs no base model.",
        "  prefix-ext inspect ./restaurant\n  prefix-ext inspect user/repo@v2 --json | jq .num_virtual_tokens",
    )
    inspect.add_argument("--json", action="store_true", help="print it as JSON, layer by layer")

    verify = command(
        "verify",
        _verify,
        "check an adapter against its base model",
        "Loads the base model and the adapter, and checks what a server would rely on: the file, that the base is the one\n"
        "it was trained on, that the model uses exactly the K/V on disk, and that they change its logits, to finite ones.",
        "  prefix-ext verify ./restaurant --base HuggingFaceTB/SmolLM2-135M-Instruct",
    )

    export = command(
        "export",
        _export,
        "write it for stock PEFT",
        "Writes an adapter that stock PEFT loads without this package, with equal logits. Stock PEFT has one K/V shape for\n"
        "all layers: a prefix with several (Gemma 4, MLA, hybrid models) is refused.",
        "  prefix-ext export ./restaurant ./restaurant-peft\n  prefix-ext export ./restaurant ./cartridge --type CARTRIDGE",
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

    run = command(
        "run",
        None,
        "run another Python program that loads prefixes",
        "Runs a command of this environment, a script or a module in this process, where PEFT knows the type PREFIX_EXT:\n"
        "the remedy for programs that load any adapter and end in KeyError: 'PREFIX_EXT'. Processes that it starts by itself\n"
        "need `import peft_prefix_ext` of their own; those of a launcher: torchrun -m peft_prefix_ext run train.py",
        "  prefix-ext run lm_eval --model hf --model_args pretrained=BASE,peft=./restaurant --tasks hellaswag\n"
        "  prefix-ext run generate.py --adapter ./restaurant\n  prefix-ext run -m package.module --option",
        "exit codes: the program's; 1 if there is no such program",
    )
    run.usage = "prefix-ext run [-h] (PROGRAM | SCRIPT.py | -m MODULE) [ARGUMENT ...]"
    run.add_argument("program", metavar="PROGRAM", nargs="+", help="what to run, and its arguments, untouched")

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
    from peft_prefix_ext.checkpoint.hub import resolve
    from peft_prefix_ext.checkpoint.reader import read_prefix
    from peft_prefix_ext.checkpoint.summary import as_dict, as_text

    prefix = read_prefix(resolve(arguments.path))
    print(json.dumps(as_dict(prefix), indent=2) if arguments.json else as_text(prefix))


def _verify(arguments: argparse.Namespace) -> None:
    from peft_prefix_ext.conversion.verify import verify

    for finding in verify(arguments.path, _load_base(arguments)):
        print(f"ok  {finding}", flush=True)


def _export(arguments: argparse.Namespace) -> None:
    from peft_prefix_ext.checkpoint.writer import check_place
    from peft_prefix_ext.conversion.stock_peft import export_to_peft

    check_place(arguments.out, [arguments.type])  # of the same type, as this command writes it
    _wrote(export_to_peft(arguments.path, arguments.out, arguments.type, task_type=arguments.task_type))


def _import(arguments: argparse.Namespace) -> None:
    from peft_prefix_ext.checkpoint.writer import check_place
    from peft_prefix_ext.conversion.sources import read_source
    from peft_prefix_ext.conversion.stock_peft import import_from_peft

    # What is wrong with either is said before a model is loaded.
    read_source(arguments.path)
    check_place(arguments.out, ["PREFIX_EXT"])
    _wrote(import_from_peft(arguments.path, arguments.out, _load_base(arguments)))


def _compose(arguments: argparse.Namespace) -> None:
    from peft_prefix_ext.checkpoint.writer import check_place
    from peft_prefix_ext.conversion.compose import compose

    check_place(arguments.out, ["PREFIX_EXT"])
    base = _load_base(arguments) if arguments.base else None
    _wrote(compose(arguments.paths, arguments.out, arguments.positions, base))


def _wrote(prefix: PrefixCheckpoint) -> None:
    from peft_prefix_ext.checkpoint.summary import as_text

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
