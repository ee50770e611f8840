"""`prefix-ext export`: writes a prefix for stock PEFT."""

from __future__ import annotations

import argparse
from typing import Any

from peft_prefix_ext.cli.common import add_command, add_out, add_path, print_summary


def add_parser(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "export",
        run,
        summary="write an adapter for stock PEFT",
        description="Writes an adapter that PEFT loads without this package, with equal logits. Stock PEFT has one K/V shape\n"
        "for all layers, so a prefix with several shapes (Gemma 4, MLA, hybrid models) is refused.",
        examples="  prefix-ext export ./restaurant ./restaurant-peft\n"
        "  prefix-ext export ./restaurant ./cartridge --type CARTRIDGE",
    )
    parser.add_argument(
        "--type",
        choices=("PREFIX_TUNING", "CARTRIDGE"),
        default="PREFIX_TUNING",
        help="PEFT's type of the new adapter (default: %(default)s)",
    )
    parser.add_argument(
        "--task-type", metavar="TYPE", help="PEFT's task type, such as CAUSAL_LM, if the adapter has none"
    )
    add_path(parser)
    add_out(parser)


def run(args: argparse.Namespace) -> None:
    from peft_prefix_ext.checkpoint.writer import check_place
    from peft_prefix_ext.conversion.stock_peft import export_to_peft

    check_place(args.out, [args.type])
    print_summary(export_to_peft(args.path, args.out, args.type, task_type=args.task_type))
