"""`prefix-ext compose`: concatenates prefixes."""

from __future__ import annotations

import argparse
from typing import Any

from peft_prefix_ext.cli.common import PATH, add_base, add_command, load_base, print_summary

# Said of all: no adapter says for certain that it was not trained.
NOTE = (
    "prefixes that were trained apart collapse behind one another (arXiv 2606.04557): measure the result, or train one to "
    "stand beside the others, with `prefix-ext distill --with OTHER`"
)


def add_parser(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "compose",
        run,
        summary="concatenate prefixes",
        description="Concatenates prefixes of one base model, in this order; the input follows the last one.\n"
        "  keep   the keys of each prefix stay at positions 0.., as in Cartridges; needs no base model\n"
        "  shift  the keys of each prefix are rotated to the positions after the previous one, as if its tokens had been\n"
        "         read there; the rotation is measured on the base model, and models with learned absolute positions\n"
        "         are refused",
        examples="  prefix-ext compose ./facts ./style --out ./both\n"
        "  prefix-ext compose ./facts ./style --out ./both --positions shift --base HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    parser.add_argument("paths", metavar="PATH_OR_REPO", nargs="+", help=f"the adapters: each {PATH}")
    parser.add_argument("--out", required=True, help="the folder to write to")
    parser.add_argument(
        "--positions",
        choices=("keep", "shift"),
        default="keep",
        help="the positions of the keys (default: %(default)s)",
    )
    add_base(parser, required=False)


def run(args: argparse.Namespace) -> None:
    if args.positions == "shift" and not args.base:
        args.parser.error("--positions shift needs --base MODEL, on which the rotation of the keys is measured")
    from peft_prefix_ext.checkpoint.writer import check_place
    from peft_prefix_ext.conversion.compose import compose

    check_place(args.out, ["PREFIX_EXT"])
    base = load_base(args) if args.base else None
    print_summary(compose(args.paths, args.out, args.positions, base))
    if len(args.paths) > 1:
        print(f"  {'note':<12}{NOTE}")
