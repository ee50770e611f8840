"""Many-shot E2E: worked examples before each input, and inputs without answers to distil them with."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.scores import bleu
from peft_prefix_ext.distillation.context import Messages
from peft_prefix_ext.distillation.questions import Question

INSTRUCTION = "Describe this place in a sentence."


@dataclass(frozen=True)
class ManyShot:
    """The task.

    Args:
        opening: The instruction and the worked examples.
        inputs: Inputs to distil with, without answers.
        tests: Inputs that neither the examples nor `inputs` have; the reference is the first sentence that people wrote.
        sentences: All sentences that people wrote for a test, by its reference.
    """

    opening: Messages
    inputs: list[Question]
    tests: list[Question]
    sentences: dict[str, list[str]]

    def bleu(self, answers: Sequence[str], references: Sequence[str]) -> float:
        """Returns the corpus BLEU of answers, 0 to 100, against all sentences of their tests."""
        return bleu(answers, [self.sentences[reference] for reference in references])


def many_shot(path: Path, num_shots: int, num_inputs: int, num_tests: int, seed: int) -> ManyShot:
    """Makes the task from `e2e.json`, which `make demo` leaves in `.demo/`."""
    sentences: dict[str, list[str]] = {}
    for example in json.loads(path.read_text(encoding="utf-8"))["examples"]:
        sentences.setdefault(example["input"], []).append(example["target"])
    facts = random.Random(seed).sample(sorted(sentences), num_shots + num_inputs + num_tests)
    shots, inputs, tests = (
        facts[:num_shots],
        facts[num_shots : num_shots + num_inputs],
        facts[num_shots + num_inputs :],
    )
    opening: Messages = [{"role": "system", "content": INSTRUCTION}]
    for each in shots:
        opening += [{"role": "user", "content": each}, {"role": "assistant", "content": sentences[each][0]}]
    return ManyShot(
        opening,
        [_question(each) for each in inputs],
        [_question(each, sentences[each][0]) for each in tests],
        {sentences[each][0]: sentences[each] for each in tests},
    )


def _question(facts: str, reference: str | None = None) -> Question:
    return Question([{"role": "user", "content": facts}], reference)
