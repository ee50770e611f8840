"""`prefix-ext compile`: the exact prefix of a text, without training."""

from __future__ import annotations

import argparse
from typing import Any

from peft_prefix_ext.cli.common import add_base, add_command, add_context, load_base, load_context, print_summary


def add_parser(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "compile",
        run,
        summary="turn a text into its prefix, without training",
        description="Writes the exact prefix of a text, of documents, or of the opening messages of a chat: the model answers as\n"
        "if they stood in the prompt, and no request tokenizes or prefills them again.\n"
        "  text files    one text, or several documents with a blank line between them\n"
        '  a .json file  the opening of a chat: [{"role": "system", "content": ...}, ...]\n'
        "Behind the opening of a chat, messages need the adapter's own chat template, which `vllm serve` takes by itself.",
        examples="  prefix-ext compile handbook.txt --base HuggingFaceTB/SmolLM2-135M-Instruct --out ./handbook --system\n"
        "  prefix-ext compile opening.json --base HuggingFaceTB/SmolLM2-135M-Instruct --out ./examples",
    )
    add_context(parser)
    parser.add_argument("--out", required=True, help="the folder to write to")
    parser.add_argument("--system", action="store_true", help="take the text as the system message of a chat")
    add_base(parser, required=True)


def run(args: argparse.Namespace) -> None:
    from peft_prefix_ext.checkpoint.writer import check_place
    from peft_prefix_ext.distillation.compile import compile_context

    check_place(args.out, ["PREFIX_EXT"])
    _, context = load_context(args, chat=args.system)
    prefix = compile_context(load_base(args), context, args.out)
    print_summary(prefix)
    print(f"  {'saves':<12}{prefix.num_virtual_tokens} tokens to send, tokenize and prefill in each request")
