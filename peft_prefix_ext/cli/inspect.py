"""`prefix-ext inspect`: prints what an adapter is."""

from __future__ import annotations

import argparse
import json
from typing import Any

from peft_prefix_ext.cli.common import add_command, add_path, print_summary


def add_parser(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "inspect",
        run,
        summary="print what an adapter is",
        description="Reads and checks an adapter of any of the three types, and prints its base model, shapes and origin.\n"
        "Needs no base model.",
        examples="  prefix-ext inspect ./restaurant\n  prefix-ext inspect user/repo@v2 --json | jq .num_virtual_tokens",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with one entry per layer")
    add_path(parser)


def run(args: argparse.Namespace) -> None:
    from peft_prefix_ext.checkpoint.hub import resolve
    from peft_prefix_ext.checkpoint.reader import read_prefix
    from peft_prefix_ext.checkpoint.summary import as_dict

    prefix = read_prefix(resolve(args.path))
    if args.json:
        print(json.dumps(as_dict(prefix), indent=2))
    else:
        print_summary(prefix)
