"""`prefix-ext train`: a prefix from a data set, in one command.

`accelerate launch -m peft_prefix_ext.cli.train DATA --model BASE --out DIR` does the same in several processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from peft_prefix_ext.cli.common import add_command, first_line, print_summary, refuse
from peft_prefix_ext.settings import add_settings, settings_of
from peft_prefix_ext.training.settings import TrainSettings

COMMAND = "train"


def add_parser(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        COMMAND,
        lambda args: run_words(sys.argv[2:]),
        summary="train a prefix on a data set",
        description="Trains a prefix with TRL's SFTTrainer. The data set is a file (JSON lines, JSON, Parquet, CSV), a folder\n"
        "or a repository on the Hub, with the columns `prompt` and `completion`, `messages`, `conversations`\n"
        "(ShareGPT), `instruction` and `output` (Alpaca), or `text`. Loss is taken on answers only.\n\n"
        "All arguments of TRL's SFTConfig, and so of transformers' TrainingArguments, are options as well: --learning_rate,\n"
        "--num_train_epochs, --per_device_train_batch_size, --bf16, --packing, --report_to, ... --config FILE.yaml has any of\n"
        "these by name. Run the same command again to go on where it stopped.",
        examples="  prefix-ext train data.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --out ./my-prefix\n"
        "  prefix-ext train owner/dataset --model BASE --out ./my-prefix --learning_rate 1e-3 --bf16\n"
        "  prefix-ext train qa.csv --model BASE --out ./my-prefix --columns prompt=question completion=answer",
    )
    add_options(parser)
    parser.add_argument("--config", metavar="FILE", help="a YAML file with arguments, which those given here override")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that TRL does not have."""
    parser.add_argument("data", metavar="DATA", help="the data set")
    parser.add_argument(
        "--model", metavar="BASE", required=True, help="the base model: a folder, or a repository on the Hub"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder of the new adapter")
    parser.add_argument("--work", metavar="FOLDER", help="the folder of the checkpoints (default: DIR-work)")
    parser.add_argument("--eval-data", "--eval_data", metavar="DATA", help="another data set to hold out")
    parser.add_argument("--subset", metavar="NAME", help="the configuration of a data set on the Hub")
    parser.add_argument("--split", metavar="NAME", help="the split to train on (default: train)")
    parser.add_argument(
        "--columns", metavar="NAME=COLUMN", nargs="+", default=[], help="what the columns are, if they have other names"
    )
    add_settings(parser, TrainSettings)


def run_words(words: Sequence[str]) -> None:
    """Parses the words behind the command, and trains."""
    if find_spec("trl") is None or find_spec("datasets") is None:
        refuse(COMMAND, ValueError("TRL is not installed; install the extra `train`."))
    from safetensors import SafetensorError

    from peft_prefix_ext.training.arguments import parse

    try:
        args, given = parse(words, f"prefix-ext {COMMAND}", add_options)
        _run(args, given)
    except (ValueError, OSError) as error:
        refuse(COMMAND, error)
    except (RuntimeError, SafetensorError) as error:  # no memory, a full disk
        refuse(
            COMMAND, ValueError(f"{first_line(error)} (Run the same command again to go on from the last checkpoint.)")
        )


def _run(args: argparse.Namespace, given: dict[str, Any]) -> None:
    from transformers.utils import logging

    from peft_prefix_ext.checkpoint.reader import read_prefix
    from peft_prefix_ext.training.dataset import parse_columns, read_examples
    from peft_prefix_ext.training.report import as_text, commands, write_report
    from peft_prefix_ext.training.samples import answer_examples
    from peft_prefix_ext.training.sft import load_tokenizer, train

    logging.set_verbosity_error()
    settings = settings_of(TrainSettings, args)
    tokenizer = load_tokenizer(args.model, trust_remote_code=given.get("trust_remote_code", False))
    examples = read_examples(
        args.data,
        eval_data=args.eval_data,
        subset=args.subset,
        split=args.split,
        columns=parse_columns(args.columns),
        held_out=settings.held_out,
        has_chat_template=tokenizer.chat_template is not None,
        seed=given.get("seed", 42),
    )
    work = args.work or f"{args.out.rstrip('/')}-work"
    trained = train(args.model, tokenizer, examples, args.out, settings, given, work)
    if not trained.is_main:
        return
    rows = examples.held_out[: settings.num_samples]
    samples = answer_examples(trained.model, tokenizer, rows, max_new_tokens=settings.max_new_tokens)
    write_report(args.out, trained.losses, trained.history, samples, len(examples.train), len(examples.held_out))
    print_summary(read_prefix(args.out))
    print("", as_text(trained.losses, samples), "", "Serve it, and ask it:", sep="\n")
    serve, ask = commands(args.model, args.out, examples.held_out[0], settings.max_new_tokens)
    print(f"\n{serve}\n\n{ask}")


if __name__ == "__main__":
    run_words(sys.argv[1:])
