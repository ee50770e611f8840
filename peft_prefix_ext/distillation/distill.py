"""Distils a context into a short prefix, in stages: compile, questions, targets, training, on-policy rounds, report.

Of several processes the first makes the targets, and the others wait for its files. All of them train.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_prefix_ext.checkpoint.atomic_save import replacing
from peft_prefix_ext.checkpoint.format import CONFIG_NAME
from peft_prefix_ext.checkpoint.writer import check_place
from peft_prefix_ext.conversion.sources import read_source
from peft_prefix_ext.distillation.companions import Companions
from peft_prefix_ext.distillation.compile import compile_context
from peft_prefix_ext.distillation.context import Context
from peft_prefix_ext.distillation.loss import reverse_kl
from peft_prefix_ext.distillation.on_policy import score_own_answers
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.reporting.evaluation import STUDENT, evaluate
from peft_prefix_ext.distillation.reporting.metrics import Metric, word_f1
from peft_prefix_ext.distillation.reporting.report import Report
from peft_prefix_ext.distillation.reporting.report_page import add_to_card, write_report
from peft_prefix_ext.distillation.settings import OF_TARGETS, DistillationSettings
from peft_prefix_ext.distillation.student import check_length, make_student, train_student
from peft_prefix_ext.distillation.synthesis import write_questions
from peft_prefix_ext.distillation.targets import Target, read_targets
from peft_prefix_ext.distillation.teacher import TEACHER, answer_questions, used_targets
from peft_prefix_ext.distillation.work_folder import DistillationFolder
from peft_prefix_ext.generation.generator import Generator, pad_token_of
from peft_prefix_ext.generation.prompts import prompt_ids
from peft_prefix_ext.generation.transformers_generator import TransformersGenerator
from peft_prefix_ext.training.processes import processes

_POLL_SECONDS = 1.0


@dataclass
class Distillation:
    """A context, the base model that is its teacher, and the stages that bring it into a short prefix.

    Each stage writes what it made to the work folder, and a later run takes it from there.

    Args:
        model: The base model. It is left as it was, but frozen.
        tokenizer: Its tokenizer, with a chat template.
        context: The context, from `chat_context`.
        settings: The settings.
        work: The work folder.
        questions: Questions of the user's own; written by the base model by default.
        companions: Folders or repositories of prefixes that the student is to stand beside.
        engine: `"transformers"`, or `"vllm"` for questions and answers in vLLM, which loads the model a second time.
        arguments: Arguments of `TrainingArguments` that are to be others than those of `train_student`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: Context
    settings: DistillationSettings
    work: str | Path
    questions: Sequence[Question] | None = None
    companions: Sequence[str | Path] = ()
    engine: str = "transformers"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.context.chat_template:
            raise ValueError("A context to distil must be the opening of a chat: make it with `chat_context`.")
        if self.settings.on_policy_rounds and processes(self.arguments).num_processes > 1:
            raise ValueError(
                "On-policy rounds run in one process: set `on_policy_rounds` to 0, or leave out `accelerate launch`."
            )
        check_length(self.context, self.settings)
        if self.questions is not None:
            # Twice the same question could be trained on and held out.
            self.questions = list({json.dumps(each.messages): each for each in self.questions}.values())
            for question in self.questions:
                prompt_ids(self.tokenizer, question.messages, self.context.chat_template)
        with processes(self.arguments).main_process_first():
            self.folder = DistillationFolder(self.work, self._inputs())

    def compile(self) -> Path:
        """Returns the folder of the exact prefix of the context, which the teacher answers with."""
        if not (self.folder.context / CONFIG_NAME).exists():
            with self.folder.timed("compile"):
                compile_context(self.model, self.context, self.folder.context)
        return self.folder.context

    def make_targets(self) -> tuple[list[Target], list[Target]]:
        """Returns the teacher's answers to train on, and those that are held out.

        Raises:
            ValueError: If too few questions are left of which the answers depend on the context.
        """
        targets = self._targets()
        if len(targets) < 3:
            raise ValueError(
                f"Only {len(targets)} questions have answers that depend on the context: give more, or other questions."
            )
        random.Random(self.settings.seed).shuffle(targets)
        count = min(self.settings.num_held_out, len(targets) // 3)
        return targets[count:], targets[:count]

    def train(self) -> dict[int, Path]:
        """Returns the folder of a trained student for each seed, the one nearest to the teacher first."""
        training, held_out = self.make_targets()
        losses = {seed: self._train(seed, training, held_out) for seed in self._seeds()}
        return {seed: self._student(seed) for seed in sorted(losses, key=losses.__getitem__)}

    def save(self, out: str | Path) -> Path:
        """Trains, and saves the best student as an adapter."""
        check_place(out, ["PREFIX_EXT"])
        best = next(iter(self.train().values()))
        if not processes(self.arguments).is_main_process:
            return Path(out)
        with replacing(Path(out)) as new:
            for path in best.iterdir():
                if path.is_file() and path.name.startswith(("adapter_", "README")):
                    shutil.copy2(path, new / path.name)
        return Path(out)

    def report(
        self, out: str | Path | None = None, *, metric: Metric = word_f1, metric_name: str = "word F1"
    ) -> Report:
        """Compares the students with the full context, with nothing, and with other openings of their length.

        Writes the report into the work folder and, if there is one, into the adapter's folder and its model card. Call it in the
        first process only.

        Args:
            out: The folder that `save` wrote the adapter to.
            metric: The score of free answers; the higher the better.
            metric_name: Its name.
        """
        students = list(self.train().values())
        _, held_out = self.make_targets()
        seconds = self.folder.seconds()
        shared = seconds["compile"] + seconds["targets"]
        training = [seconds[f"train {student.name}"] for student in students]
        with self._generator() as generator:
            report = evaluate(
                generator,
                self.tokenizer,
                self.context,
                [target.question for target in held_out],
                {"prefix": students},
                metric=metric,
                metric_name=metric_name,
                max_new_tokens=self.settings.max_new_tokens,
                seconds_spent=shared + fmean(training),
                seed=self.settings.seed,
                settings=self.settings.to_dict(),
            )
        write_report(report, self.folder.path)
        if out is not None:
            write_report(report, Path(out))
            add_to_card(Path(out), report)
        return report

    def _inputs(self) -> dict[str, Any]:
        settings = self.settings.to_dict()
        own = None if self.questions is None else [[each.messages, each.reference] for each in self.questions]
        return {
            "base": [self.model.name_or_path, getattr(self.model.config, "_commit_hash", None), str(self.model.dtype)],
            "context": self.context.digest,
            "questions": own,
            **{name: settings[name] for name in OF_TARGETS},
        }

    def _targets(self) -> list[Target]:
        path = self.folder.targets
        # A barrier would give up long before all answers are there.
        while not (is_answered := self.folder.is_answered()) and not processes(self.arguments).is_main_process:
            time.sleep(_POLL_SECONDS)
        if is_answered:
            return used_targets(read_targets(path))
        questions = self.folder.questions()
        self.compile()
        with self.folder.timed("targets"), self._generator() as generator:
            if questions is None:
                questions = list(self.questions or self._write_questions(generator))
                self.folder.write_questions(questions)
            return answer_questions(generator, self.tokenizer, self.context, questions, self.settings, path)

    def _write_questions(self, generator: Generator) -> list[Question]:
        settings = self.settings
        return write_questions(
            generator, self.tokenizer, self.context, settings.num_questions, settings.seed, prefix=TEACHER
        )

    def _seeds(self) -> range:
        return range(self.settings.seed, self.settings.seed + self.settings.seeds)

    def _student(self, seed: int) -> Path:
        shared = {name: value for name, value in self.settings.to_dict().items() if name not in ("seed", "seeds")}
        companions = [read_source(each).digest for each in self.companions]
        return self.folder.student({**shared, "companions": companions, **self.arguments}, seed)

    def _train(self, seed: int, training: Sequence[Target], held_out: Sequence[Target]) -> float:
        """Returns the divergence of a student on the held-out questions, from an earlier run if it was trained then."""
        folder = self._student(seed)
        if (result := self.folder.result(folder)) is not None:
            return float(result["divergence"])
        companions = Companions(self.companions, self.model, seed=seed) if self.companions else None
        pad = pad_token_of(self.tokenizer)
        is_main = processes(self.arguments).is_main_process
        with self.folder.timed(f"train {folder.name}") if is_main else nullcontext():
            student = make_student(self.model, self.context, self.settings, seed)
            try:
                loss = train_student(
                    student,
                    training,
                    held_out,
                    self.settings,
                    seed,
                    folder,
                    pad,
                    companions=companions,
                    **self.arguments,
                )
            finally:
                student.unload()
            for number in range(self.settings.on_policy_rounds):
                loss = self._on_policy(number, seed, training, held_out, folder, companions)
        if not is_main:
            return loss
        self.folder.write_result(folder, {"divergence": loss, **self.settings.to_dict()})
        for checkpoints in folder.glob("checkpoints-*"):
            shutil.rmtree(checkpoints, ignore_errors=True)
        return loss

    def _on_policy(
        self,
        number: int,
        seed: int,
        training: Sequence[Target],
        held_out: Sequence[Target],
        folder: Path,
        companions: Companions | None,
    ) -> float:
        with self._generator() as generator:
            generator.add_prefix(STUDENT, folder)
            answers = score_own_answers(generator, STUDENT, training, self.settings, number, seed)
        student = PeftModel.from_pretrained(self.model, str(folder), is_trainable=True)
        try:
            return train_student(
                student,
                answers,
                held_out,
                self.settings,
                seed,
                folder,
                pad_token_of(self.tokenizer),
                divergence=reverse_kl,
                companions=companions,
                stage=f"round-{number}",
                **{"num_train_epochs": 1, **self.arguments},
            )
        finally:
            student.unload()

    @contextmanager
    def _generator(self) -> Iterator[Generator]:
        if self.engine == "vllm":
            from peft_prefix_ext.generation.vllm_generator import VLLMGenerator

            with VLLMGenerator(
                str(self.model.name_or_path),
                dtype=str(self.model.dtype).removeprefix("torch."),
                prefixes={TEACHER: self.folder.context},
                tokenizer=self.tokenizer.name_or_path or None,
            ) as engine:
                yield engine
            return
        generator = TransformersGenerator(self.model, self.tokenizer)
        generator.add_prefix(TEACHER, self.folder.context)
        try:
            yield generator
        finally:
            generator.close()
