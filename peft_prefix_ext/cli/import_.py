"""`prefix-ext import`: writes a stock PEFT prefix as a PREFIX_EXT adapter."""

from __future__ import annotations

import argparse
from typing import Any

from peft_prefix_ext.cli.common import add_base, add_command, add_out, add_path, load_base, print_summary


def add_parser(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "import",
        run,
        summary="convert a stock PEFT prefix to PREFIX_EXT",
        description="Writes a stock PREFIX_TUNING or CARTRIDGE adapter as a PREFIX_EXT one, with equal logits: to continue its\n"
        "training, or to use it where stock PEFT fails (gradient checkpointing, static caches, padded batches with\n"
        "sliding windows).",
        examples="  prefix-ext import ./stock ./ours --base HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    add_path(parser)
    add_out(parser)
    add_base(parser, required=True)


def run(args: argparse.Namespace) -> None:
    from peft_prefix_ext.checkpoint.writer import check_place
    from peft_prefix_ext.conversion.sources import read_source
    from peft_prefix_ext.conversion.stock_peft import import_from_peft

    # Both may be refused: do so before a model is loaded.
    read_source(args.path)
    check_place(args.out, ["PREFIX_EXT"])
    print_summary(import_from_peft(args.path, args.out, load_base(args)))
