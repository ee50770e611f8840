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
    chats = [source for source in args.sources if source.endswith(".json")]
    if chats and (args.system or len(args.sources) > 1):
        args.parser.error("a .json file is a whole chat: give it alone, without --system")
    from peft_prefix_ext.checkpoint.writer import check_place
    from peft_prefix_ext.distillation.compile import compile_context
    from peft_prefix_ext.distillation.context import SEPARATOR, chat_context, read_messages, read_text, text_context

    check_place(args.out, ["PREFIX_EXT"])
    tokenizer = _load_tokenizer(args.tokenizer or args.base)
    texts = [read_text(path) for path in args.sources]
    if chats or args.system:
        system = {"role": "system", "content": SEPARATOR.join(texts)}
        messages = read_messages(chats[0]) if chats else [system]
        context = chat_context(tokenizer, messages, dict(zip(args.sources, texts, strict=True)))
    else:
        context = text_context(tokenizer, texts, args.sources)
    prefix = compile_context(load_base(args), context, args.out)
    print_summary(prefix)
    print(f"  {'saves':<12}{prefix.num_virtual_tokens} tokens to send, tokenize and prefill in each request")


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no tokenizer at {source!r}; give --tokenizer MODEL.") from error
