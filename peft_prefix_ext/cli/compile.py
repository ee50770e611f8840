"""`prefix-ext compile`: the exact prefix of a text, without training."""

from __future__ import annotations

import argparse
from typing import Any

from peft_prefix_ext.cli.common import add_base, add_command, load_base, print_summary


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
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="text files, or one .json file with messages")
    parser.add_argument("--out", required=True, help="the folder to write to")
    parser.add_argument("--system", action="store_true", help="take the text as the system message of a chat")
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="where to load the tokenizer from (default: the base model)"
    )
    add_base(parser, required=True)


def run(args: argparse.Namespace) -> None:
    from peft_prefix_ext.checkpoint.writer import check_place
    from peft_prefix_ext.distillation.compile import compile_context
    from peft_prefix_ext.distillation.context import SEPARATOR, chat_context, read_sources, text_context

    check_place(args.out, ["PREFIX_EXT"])
    found = read_sources(args.sources)
    tokenizer = _load_tokenizer(args.tokenizer or args.base)
    texts = [text for text in found if isinstance(text, str)]
    if args.system and not texts:
        args.parser.error("--system takes text files; the messages in a .json file have roles of their own")
    if args.system:
        context = chat_context(tokenizer, [{"role": "system", "content": SEPARATOR.join(texts)}], args.sources[0])
    elif texts:
        context = text_context(tokenizer, texts, args.sources)
    else:
        context = chat_context(tokenizer, found, args.sources[0])
    prefix = compile_context(load_base(args), context, args.out)
    print_summary(prefix)
    print(f"  {'saves':<12}{prefix.num_virtual_tokens} tokens to send, tokenize and prefill in each request")


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no tokenizer at {source!r}; give --tokenizer MODEL.") from error
