"""Next-token training: a prefix that learns the text itself, token by token, instead of answers to questions about it.

It has the start, the steps, the batch size and the stopping rule of a distilled prefix. Only what is learned differs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from peft_prefix_ext.checkpoint.format import CONFIG_NAME
from peft_prefix_ext.distillation.distill import Distillation
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.student import make_student, train_student
from peft_prefix_ext.distillation.targets import Target
from peft_prefix_ext.generation.generator import TokenIds, TopLogprobs, pad_token_of

CHUNK_TOKENS = 96


def train_on_text(distillation: Distillation, text: str, folder: Path) -> Path:
    """Trains a prefix on chunks of a text, as many as there are answers to distil, unless the folder has it already.

    Training stops, and the best state is chosen, by the same held-out answers as in distillation.
    """
    if (folder / CONFIG_NAME).exists():
        return folder
    training, held_out = distillation.make_targets()
    settings, tokenizer = distillation.settings, distillation.tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    student = make_student(distillation.model, distillation.context, settings, settings.seed)
    try:
        train_student(
            student,
            chunk_targets(ids, len(training), settings.seed),
            held_out,
            settings,
            settings.seed,
            folder,
            pad_token_of(tokenizer),
            **distillation.arguments,
        )
    finally:
        student.unload()
    return folder


def chunk_targets(ids: Sequence[int], number: int, seed: int) -> list[Target]:
    """Returns random chunks of a text as targets that give each next token all probability.

    With one token of probability one, the divergence is the cross entropy. The first token of a chunk is its prompt.
    """
    draw = random.Random(seed)
    length = min(CHUNK_TOKENS, len(ids))
    starts = [draw.randint(0, len(ids) - length) for _ in range(number)]
    return [_target(index, list(ids[start : start + length])) for index, start in enumerate(starts)]


def _target(number: int, chunk: TokenIds) -> Target:
    first, *rest = chunk
    certain = TopLogprobs([[token] for token in rest], [[0.0] for _ in rest], [])
    return Target.of(number, Question([{"role": "user", "content": ""}]), [first], rest, certain)
