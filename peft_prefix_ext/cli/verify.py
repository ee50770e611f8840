"""`prefix-ext verify`: checks an adapter on its base model."""

from __future__ import annotations

import argparse
from typing import Any

from peft_prefix_ext.cli.common import add_base, add_command, add_path, load_base


def add_parser(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "verify",
        run,
        summary="check an adapter on its base model",
        description="Loads the base model and the adapter, and checks what a server relies on: the file is valid, the adapter\n"
        "was trained on this base model, the model uses exactly the K/V on disk, and the K/V change its logits\n"
        "without NaN or Inf. Warns when the files or the chat template that it was compiled from have changed since.",
        examples="  prefix-ext verify ./restaurant --base HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    add_path(parser)
    add_base(parser, required=True)


def run(args: argparse.Namespace) -> None:
    from peft_prefix_ext.conversion.verify import verify

    for finding in verify(args.path, load_base(args)):
        print(f"ok  {finding}", flush=True)
