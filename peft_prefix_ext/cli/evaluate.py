"""`prefix-ext evaluate`: how good an adapter is on a data set or on tasks of lm-eval, beside its base model."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from typing import Any

from peft_prefix_ext.cli.common import add_adapter, add_command, load_adapter

METRICS = ("loss", "exact_match", "bleu", "rouge_l")
BASE = "base model"


def add_parser(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "evaluate",
        run,
        summary="measure an adapter on a data set or on tasks of lm-eval",
        description="Measures an adapter and its base model side by side: the loss of the right answers in nats per token, how\n"
        "many greedy answers are exactly right in a hundred, and BLEU and ROUGE-L. The data set is anything that\n"
        "`prefix-ext train` takes. With --tasks, tasks of EleutherAI's lm-evaluation-harness instead.",
        examples="  prefix-ext evaluate ./restaurant test.jsonl\n"
        "  prefix-ext evaluate ./restaurant test.jsonl --metrics loss exact_match --json scores.json\n"
        "  prefix-ext evaluate ./restaurant --tasks hellaswag arc_easy",
    )
    add_adapter(parser)
    parser.add_argument("data", metavar="DATA", nargs="?", help="the data set")
    parser.add_argument("--split", metavar="NAME", help="its split (default: test or validation, else train)")
    parser.add_argument("--subset", metavar="NAME", help="its configuration on the Hub")
    parser.add_argument("--columns", metavar="NAME=COLUMN", nargs="+", default=[], help="what its columns are")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=METRICS, help="default: all")
    parser.add_argument("--tasks", metavar="TASK", nargs="+", help="tasks of lm-eval, which must be installed")
    parser.add_argument("--limit", metavar="N", type=int, help="take the first N examples only")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--no-base", action="store_true", help="leave out the base model")
    parser.add_argument("--json", metavar="FILE", help="where to write the scores as well")


def run(args: argparse.Namespace) -> None:
    if (args.data is None) == (args.tasks is None):
        args.parser.error("give a data set, or --tasks")
    for name in ("limit", "max_new_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            args.parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    scores = _run_tasks(args) if args.tasks else _run_data(args)
    metrics = list(next(iter(scores.values())))
    widths = [max(len(metric), 10) for metric in metrics]
    print(" " * 14 + "  ".join(metric.rjust(width) for metric, width in zip(metrics, widths, strict=True)))
    for name, row in scores.items():
        cells = (f"{row[metric]:{width}.4f}" for metric, width in zip(metrics, widths, strict=True))
        print(f"{name[:13]:<14}" + "  ".join(cells))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(scores, file, indent=2)


def _run_data(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    from peft_prefix_ext.training.dataset import parse_columns, read_test_examples
    from peft_prefix_ext.training.evaluation import check_metrics, evaluate
    from peft_prefix_ext.training.samples import ADAPTER

    check_metrics(args.metrics)
    model, tokenizer = load_adapter(args)
    rows = read_test_examples(
        args.data,
        subset=args.subset,
        split=args.split,
        columns=parse_columns(args.columns),
        has_chat_template=tokenizer.chat_template is not None,
    )[: args.limit]
    prefixes = {} if args.no_base else {BASE: None}
    return {
        name: evaluate(
            model,
            tokenizer,
            rows,
            args.metrics,
            prefix=prefix,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
        )
        for name, prefix in {**prefixes, "prefix": ADAPTER}.items()
    }


def _run_tasks(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError('--tasks needs lm-eval: pip install "lm-eval[hf]".') from error
    model, tokenizer = load_adapter(args)
    scores = {}
    for name in ([] if args.no_base else [BASE]) + ["prefix"]:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size)
        with model.disable_adapter() if name == BASE else nullcontext():
            results = simple_evaluate(model=wrapped, tasks=args.tasks, limit=args.limit)["results"]
        scores[name] = {
            f"{task} {metric.partition(',')[0]}": value
            for task, found in results.items()
            for metric, value in found.items()
            if isinstance(value, float) and "stderr" not in metric
        }
    return scores
