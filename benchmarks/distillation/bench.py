"""What the tasks share: the model, the results, the work folders and the distillations in them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common.machine import machine
from benchmarks.common.results import ResultsFile
from benchmarks.distillation.settings import Settings
from peft_prefix_ext.distillation.context import Context
from peft_prefix_ext.distillation.distill import Distillation
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.settings import DistillationSettings
from peft_prefix_ext.generation.transformers_generator import TransformersGenerator


class Bench:
    """A model under test.

    Args:
        settings: The settings.
        results: The results file.
        work: The folder with the work folders of all distillations, which resume there.
        engine: What answers the questions to train on: "transformers" or "vllm".
    """

    def __init__(self, settings: Settings, results: ResultsFile, work: Path, engine: str = "transformers") -> None:
        self.settings, self.results, self.work, self.engine = settings, results, work, engine

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.settings.model)
        return found

    @cached_property
    def model(self) -> PreTrainedModel:
        dtype = getattr(torch, self.settings.dtype)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.settings.model, dtype=dtype, device_map=device
        )
        return found

    def is_missing(self, **key: Any) -> bool:
        """Whether there is no record that has all these fields."""
        return not self.results.find(**key)

    def add(self, **record: Any) -> None:
        """Records a measurement."""
        self.results.add({**record, "engine": self.engine, "machine": machine()})
        shown = {name: value for name, value in record.items() if not isinstance(value, (dict, list))}
        print(f"measured: {shown}", file=sys.stderr, flush=True)

    def distillation(
        self,
        name: str,
        context: Context,
        settings: DistillationSettings,
        questions: Sequence[Question],
        num_steps: int,
        companions: Sequence[Path] = (),
    ) -> Distillation:
        """Returns a distillation in the work folder `name`."""
        return Distillation(
            self.model,
            self.tokenizer,
            context,
            settings,
            self.work / name,
            questions=questions,
            companions=companions,
            engine=self.engine,
            arguments={"max_steps": num_steps},
        )

    @contextmanager
    def generator(self, **prefixes: Path) -> Iterator[TransformersGenerator]:
        """Yields the model with prefixes by their names, and takes them off again."""
        generator = TransformersGenerator(self.model, self.tokenizer)
        try:
            for name, folder in prefixes.items():
                generator.add_prefix(name, folder)
            yield generator
        finally:
            generator.close()


def student_of(distillation: Distillation) -> Path:
    """Trains the only student of a distillation, unless it is there already, and returns its folder."""
    (folder,) = distillation.train().values()
    return folder


def divergence_of(distillation: Distillation, student: Path) -> float | None:
    """Returns the divergence of a student from its teacher on the held-out questions, which says how training went."""
    found = distillation.folder.result(student)
    return None if found is None else round(float(found["divergence"]), 4)
