"""`prefix-ext distill`: a context as a short prefix, trained to answer like the model with the context in its prompt.

`accelerate launch -m peft_prefix_ext distill SOURCE --base BASE --out DIR` trains in several processes.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

from peft_prefix_ext.cli.common import (
    add_base,
    add_command,
    add_context,
    first_line,
    load_base,
    load_context,
    print_summary,
)
from peft_prefix_ext.distillation.settings import DistillationSettings
from peft_prefix_ext.settings import add_settings, settings_of

ENGINES = ("auto", "transformers", "vllm")


def add_parser(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "distill",
        run,
        summary="train a short prefix that stands for a long context",
        description="Trains a prefix of a few tokens to answer like the base model with a long context in its prompt:\n"
        "  1. the base model writes questions about the context, or you give them (--queries)\n"
        "  2. it answers them with the context before it; its answers are stored with their log-probabilities\n"
        "  3. the prefix is trained to give these answers without the context\n"
        "  4. a report compares it with the full context, with none, and with other ways to shorten it\n"
        "Each stage leaves its result in the work folder. Run the same command again to go on where it stopped.",
        examples="  prefix-ext distill handbook.txt --base HuggingFaceTB/SmolLM2-135M-Instruct --out ./handbook\n"
        "  prefix-ext distill examples.json --base HuggingFaceTB/SmolLM2-135M-Instruct --out ./examples --queries inputs.txt",
    )
    add_context(parser)
    parser.add_argument("--out", required=True, help="the folder of the new adapter")
    parser.add_argument("--work", metavar="FOLDER", help="the folder of the stages (default: OUT-work)")
    parser.add_argument(
        "--queries",
        metavar="FILE",
        help="your own questions: a line of text each, or JSON lines with `question` and optionally `answer`, or `messages`",
    )
    parser.add_argument(
        "--with",
        metavar="OTHER",
        nargs="+",
        default=[],
        dest="companions",
        help="prefixes that the new one is to be composed with",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="what answers questions (default: vllm if it is installed, else transformers)",
    )
    parser.add_argument("--no-report", action="store_true", help="leave out the report")
    add_base(parser, required=True)
    add_settings(parser, DistillationSettings)


def run(args: argparse.Namespace) -> None:
    import torch
    from safetensors import SafetensorError

    from peft_prefix_ext.checkpoint.reader import read_prefix
    from peft_prefix_ext.checkpoint.writer import check_place
    from peft_prefix_ext.distillation.distill import Distillation
    from peft_prefix_ext.distillation.questions import read_questions
    from peft_prefix_ext.training.processes import processes

    settings = settings_of(DistillationSettings, args)
    # Each process has a device of its own from here on.
    is_main = processes({}).is_main_process
    check_place(args.out, ["PREFIX_EXT"])
    tokenizer, context = load_context(args, chat=True)
    model = load_base(args)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    distillation = Distillation(
        model,
        tokenizer,
        context,
        settings,
        work=args.work or f"{args.out.rstrip('/')}-work",
        questions=read_questions(args.queries) if args.queries else None,
        companions=args.companions,
        engine=_engine(args.engine),
    )
    try:
        distillation.save(args.out)
        if not is_main:
            return
        print_summary(read_prefix(args.out))
        print(f"  {'stands for':<12}{len(context.token_ids)} tokens")
        if not args.no_report:
            print("", *distillation.report(args.out).verdict(), f"See {args.out}/report.md.", sep="\n")
    except (RuntimeError, SafetensorError) as error:  # no memory, a full disk, an engine that does not start
        raise ValueError(f"{first_line(error)} (Run the same command again to go on from here.)") from error


def _engine(name: str) -> str:
    is_there = find_spec("vllm") is not None
    if name == "vllm" and not is_there:
        raise ValueError("vLLM is not installed; install the extra `serve`, or use `--engine transformers`.")
    return name if name != "auto" else "vllm" if is_there else "transformers"
