"""A training step of distillation, against a plain one of the same student on the same rows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import DefaultDataCollator, Trainer, TrainingArguments

from benchmarks.common.interleaving import Measurement, interleave
from benchmarks.distillation.bench import Bench
from peft_prefix_ext.distillation.context import Context
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.student import make_student
from peft_prefix_ext.distillation.targets import Target
from peft_prefix_ext.distillation.trainer import DistillationTrainer, TargetCollator
from peft_prefix_ext.generation.batching import IGNORED
from peft_prefix_ext.generation.generator import TopLogprobs, pad_token_of

TASK = "step"
PLAIN, DISTILLATION = "plain", "distillation"
SECONDS = "seconds"
LEARNING_RATE = 1e-4  # small, so that the cost of a step does not depend on the steps before it


def run(bench: Bench) -> None:
    """Lets both steps take turns on one student, unless that is recorded."""
    if bench.is_missing(task=TASK):
        with tempfile.TemporaryDirectory() as folder:
            bench.add(task=TASK, measurements=_measure(bench, folder))


def _measure(bench: Bench, folder: str) -> dict[str, list[Measurement]]:
    settings = bench.settings
    options = settings.distillation(settings.prefix_tokens, settings.step_length, seed=0)
    vocabulary = int(bench.model.config.get_text_config().vocab_size)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (settings.prefix_tokens + 1,), generator=draw).tolist()
    student = make_student(bench.model, Context(ids), options, seed=0)
    try:
        targets = random_targets(settings.batch_size, settings.step_length, options.top_k, vocabulary)
        arguments = TrainingArguments(output_dir=folder, report_to="none", remove_unused_columns=False)
        distillation = DistillationTrainer(student, arguments)
        plain = Trainer(student, arguments)
        optimizer = torch.optim.AdamW([each for each in student.parameters() if each.requires_grad], lr=LEARNING_RATE)
        collate = TargetCollator(pad_token_of(bench.tokenizer))
        return interleave(
            {
                PLAIN: partial(_timed, plain, optimizer, partial(DefaultDataCollator(), labelled(targets))),
                DISTILLATION: partial(_timed, distillation, optimizer, partial(collate, targets)),
            },
            settings.step_rounds,
        )
    finally:
        student.unload()


def random_targets(number: int, length: int, top_k: int, vocabulary: int) -> list[Target]:
    """Returns answers of one length behind prompts of the same length, together `length` tokens, as a work folder holds them."""
    draw = torch.Generator().manual_seed(0)
    size = length // 2
    top_k = min(top_k, vocabulary)
    targets = []
    for index in range(number):
        prompt, answer = torch.randint(vocabulary, (2, size), generator=draw).tolist()
        top = torch.randn(size, vocabulary, generator=draw).log_softmax(-1).topk(top_k)
        scores = TopLogprobs(top.indices.tolist(), top.values.tolist(), [])
        targets.append(Target.of(index, Question([{"role": "user", "content": ""}]), prompt, answer, scores))
    return targets


def labelled(targets: Sequence[Target]) -> list[dict[str, list[int]]]:
    """Returns the same rows for training on the answers themselves."""
    return [
        {
            "input_ids": [*target.prompt_ids, *target.answer_ids],
            "attention_mask": [1] * (len(target.prompt_ids) + len(target.answer_ids)),
            "labels": [IGNORED] * len(target.prompt_ids) + target.answer_ids,
        }
        for target in targets
    ]


def _timed(trainer: Trainer, optimizer: torch.optim.Optimizer, collate: Callable[[], dict[str, Any]]) -> Measurement:
    """Returns the seconds from the rows to the updated student."""
    model: Any = trainer.model
    model.train()
    device = next(model.parameters()).device
    _synchronize()
    start = time.perf_counter()
    batch = {name: tensor.to(device) for name, tensor in collate().items()}
    loss: Any = trainer.compute_loss(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    _synchronize()
    return {SECONDS: time.perf_counter() - start}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
