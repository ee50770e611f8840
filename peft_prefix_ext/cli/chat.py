"""`prefix-ext chat`: talk to a model with an adapter, for a first look."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from peft_prefix_ext.cli.common import add_adapter, add_command, load_adapter

HELP = "/new starts anew, /base turns the prefix off and on, /exit ends."


def add_parser(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "chat",
        run,
        summary="talk to a model with an adapter",
        description="Loads the base model and the adapter in transformers, and answers each line of the standard input. A base\n"
        "model without a chat template continues each line.\n\n" + HELP,
        examples="  prefix-ext chat ./restaurant\n  echo 'name: Aromi, food: Italian' | prefix-ext chat ./restaurant",
    )
    add_adapter(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message before the chat")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="default: %(default)s")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 for greedy answers (the default)"
    )


def run(args: argparse.Namespace) -> None:
    model, tokenizer = load_adapter(args)
    if args.system and tokenizer.chat_template is None:
        args.parser.error("--system needs a base model with a chat template")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(HELP)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
    with_prefix = True
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/exit":
            return
        if line == "/new":
            messages = list(opening)
        elif line == "/base":
            with_prefix = not with_prefix
            print(f"(the prefix is {'on' if with_prefix else 'off'})")
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _answer(model, tokenizer, messages, args, with_prefix=with_prefix)
            messages.append({"role": "assistant", "content": answer})


def _answer(
    model: Any, tokenizer: Any, messages: list[dict[str, str]], args: argparse.Namespace, *, with_prefix: bool
) -> str:
    from contextlib import nullcontext

    import torch
    from transformers import TextStreamer

    from peft_prefix_ext.generation.generator import text_of
    from peft_prefix_ext.generation.prompts import prompt_ids

    if tokenizer.chat_template is None:
        ids = tokenizer(messages[-1]["content"]).input_ids
    else:
        ids = prompt_ids(tokenizer, messages)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    with nullcontext() if with_prefix else model.disable_adapter():
        tokens = model.generate(
            input_ids=torch.tensor([ids], device=model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            max_new_tokens=args.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or 0,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
    return text_of(tokenizer, tokens[0, len(ids) :].tolist())
