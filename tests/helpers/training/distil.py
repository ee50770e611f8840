"""Distils a context into a prefix of a tiny model, in as many processes as there are; launched by `test_distributed.py`.

    python distil.py FOLDER BATCH_SIZE

Leaves FOLDER/work and FOLDER/out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from helpers.chats import CHATML, tokenizer_with
from helpers.tiny import tiny_model
from peft_prefix_ext.distillation.context import chat_context
from peft_prefix_ext.distillation.distill import Distillation
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.settings import DistillationSettings
from peft_prefix_ext.training.processes import processes

SYSTEM = [{"role": "system", "content": "Aromi serves Italian food near the river. " * 4}]
QUESTIONS = [Question([{"role": "user", "content": f"Question {number}?"}]) for number in range(19)]


def main(folder: Path, batch_size: int) -> None:
    tokenizer = tokenizer_with(CHATML)
    settings = DistillationSettings(
        num_virtual_tokens=8,
        num_held_out=3,
        max_new_tokens=6,
        top_k=5,
        num_epochs=2,
        batch_size=batch_size,
        token_dropout=0.0,
    )
    # Adam divides by the size of a gradient: an epsilon that hides none lets rounding decide over the smallest.
    arguments = {"disable_tqdm": True, "adam_epsilon": 1e-3, "lr_scheduler_type": "constant"}
    distillation = Distillation(
        tiny_model("llama", vocab_size=len(tokenizer)),
        tokenizer,
        chat_context(tokenizer, SYSTEM),
        settings,
        work=folder / "work",
        questions=QUESTIONS,
        arguments=arguments,
    )
    out = distillation.save(folder / "out")
    if processes(arguments).is_main_process:
        distillation.report(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
