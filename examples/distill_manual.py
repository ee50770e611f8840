"""Distils a page of Python's manual into a short prefix, and reports what is left of it.

    python examples/distill_manual.py                      # the page on functions, SmolLM2-135M-Instruct
    python examples/distill_manual.py --topic FORMATTING --model Qwen/Qwen2.5-1.5B-Instruct --num-questions 128

The pages are those of `help()` (`pydoc_data.topics`), so nothing is downloaded but the model. The model writes the questions and
answers them with the page in its prompt; the prefix learns its answers. Prints the table and the verdict of the report.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from pydoc_data.topics import topics

from smollm2 import get_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_prefix_ext.distillation.context import chat_context
from peft_prefix_ext.distillation.distill import Distillation
from peft_prefix_ext.distillation.questions import read_questions
from peft_prefix_ext.distillation.reporting.report_page import to_markdown
from peft_prefix_ext.distillation.settings import DistillationSettings
from peft_prefix_ext.training.report import server


def main() -> int:
    args = parse_args()
    model = args.model or str(get_smollm2(Path(".demo")))
    tokenizer = AutoTokenizer.from_pretrained(model)
    page = topics[args.topic]
    distillation = Distillation(
        AutoModelForCausalLM.from_pretrained(model),
        tokenizer,
        chat_context(tokenizer, [{"role": "system", "content": page}], {args.topic: page}),
        DistillationSettings(
            num_virtual_tokens=args.num_virtual_tokens,
            num_questions=args.num_questions,
            max_new_tokens=args.max_new_tokens,
        ),
        work=args.output / "work",
        questions=read_questions(args.queries) if args.queries else None,
    )
    folder = distillation.save(args.output / "adapter")
    print(to_markdown(distillation.report(folder)))
    print(shlex.join([*server(), model, "--prefix-adapter", f"manual={folder}"]))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct, from a package)")
    parser.add_argument(
        "--topic", choices=sorted(topics), default="function", metavar="TOPIC", help="default: exceptions"
    )
    parser.add_argument("--output", type=Path, default=Path(".demo/manual"), help="default: %(default)s")
    parser.add_argument("--queries", type=Path, help="your own questions (default: the model writes them)")
    for name, default in (("num-virtual-tokens", 64), ("num-questions", 64), ("max-new-tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
