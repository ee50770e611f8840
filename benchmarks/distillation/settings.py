"""The settings of the benchmark, and the distillations that follow from them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import Record
from benchmarks.distillation.manual_page import TOPIC
from peft_prefix_ext.distillation.settings import DistillationSettings

TASKS = ("many-shot", "documents", "together", "speed", "step")
SEEDS = (0, 1, 2)
LENGTHS = (16, 64, 128, 256)


@dataclass(frozen=True)
class Settings:
    """What the results depend on, besides the seeds and the lengths of prefixes, which each record has.

    Args:
        model: Hub id or folder.
        dtype: The data type of the model in training and exams.
        batch_size: Of the training.
        num_held_out: Questions for early stopping.
        num_shots: Worked examples of the many-shot task.
        num_inputs: Its inputs without answers.
        num_tests: Its tests.
        many_shot_tokens: The length of its prefix.
        many_shot_steps: Its training steps.
        many_shot_answer: The length of its longest answer.
        topic: The page of the manual.
        num_questions: Questions about it that the model writes, with those of the exam.
        num_people: People of the fact sheet.
        num_exam: Questions of the exam on a document; half as many on each sheet that is put together with others.
        document_steps: The training steps on a document.
        document_answer: The length of the longest answer to one.
        num_sheets: Fact sheets that are put together.
        people_per_sheet: People of each of them.
        together_tokens: The length of the prefix of each.
        requests: Requests at once where speed is measured.
        context_tokens: The length of the full context there.
        prefix_tokens: The length of the distilled prefix there, and in the training step.
        input_tokens: Of a request.
        output_tokens: Of an answer.
        speed_dtype: The data type of the engine.
        block_size: Of its cache.
        cache_gib: The size of its cache: two rounds must not evict the cached text.
        speed_rounds: Interleaved rounds.
        step_length: Tokens of a row of the training step, half of them the answer.
        step_rounds: Interleaved rounds.
    """

    model: str
    dtype: str = "float32"
    batch_size: int = 4
    num_held_out: int = 16
    num_shots: int = 16
    num_inputs: int = 96
    num_tests: int = 48
    many_shot_tokens: int = 64
    many_shot_steps: int = 100
    many_shot_answer: int = 48
    topic: str = TOPIC
    num_questions: int = 144
    num_people: int = 24
    num_exam: int = 48
    document_steps: int = 120
    document_answer: int = 32
    num_sheets: int = 4
    people_per_sheet: int = 8
    together_tokens: int = 64
    requests: int = 32
    context_tokens: int = 954
    prefix_tokens: int = 64
    input_tokens: int = 32
    output_tokens: int = 32
    # A CPU without bfloat16 instructions takes three times as long in it.
    speed_dtype: str = "bfloat16" if torch.cuda.is_available() else "float32"
    # vLLM's CPU kernel requires multiples of 32.
    block_size: int = 16 if torch.cuda.is_available() else 32
    cache_gib: int = 4
    speed_rounds: int = 5
    step_length: int = 96
    step_rounds: int = 15

    def record(self) -> Record:
        """Returns the settings for the results file, with the name of the model instead of its folder."""
        return json.loads(json.dumps({**asdict(self), "model": Path(self.model).name}))

    def distillation(self, num_virtual_tokens: int, max_new_tokens: int, seed: int) -> DistillationSettings:
        """Returns the settings of a distillation; those that are not here are the defaults."""
        return DistillationSettings(
            num_virtual_tokens=num_virtual_tokens,
            num_held_out=self.num_held_out,
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
            seed=seed,
        )


# To see that everything runs; the figures say little.
SHORT: dict[str, Any] = {
    **{"num_held_out": 4, "num_shots": 8, "num_inputs": 24, "num_tests": 8, "many_shot_steps": 8},
    **{"num_questions": 32, "num_people": 8, "num_exam": 12, "document_steps": 8, "document_answer": 24},
    **{"num_sheets": 2, "people_per_sheet": 4, "together_tokens": 32, "requests": 8, "output_tokens": 8},
    **{"speed_rounds": 2, "step_rounds": 3},
}
SHORT_SEEDS, SHORT_LENGTHS = (0,), (16, 64)
