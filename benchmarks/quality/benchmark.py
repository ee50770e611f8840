"""Trains and scores the methods, and records each run."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from benchmarks.common.results import Record, ResultsFile
from benchmarks.quality.dataset import TEST_FILE, TRAIN_FILE, group, hold_out, read_pairs
from benchmarks.quality.methods import Method, variants
from benchmarks.quality.scores import score
from benchmarks.quality.training_loop import encode, generate, mean_loss, train

ALL = "all"


@dataclass(frozen=True)
class Size:
    """The budget of a run.

    Args:
        rows: Rows of the training set; None for all.
        steps: Optimizer steps.
        tests: Meaning representations of the test set that are scored.
    """

    rows: int | None
    steps: int
    tests: int

    @property
    def name(self) -> str:
        return ALL if self.rows is None else str(self.rows)


@dataclass(frozen=True)
class Settings:
    """The settings that all runs share."""

    model: str
    sizes: tuple[Size, ...] = (Size(None, 160, 200), Size(200, 80, 100), Size(50, 40, 100))
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 4
    dtype: str = "bfloat16"
    attention: str = "eager"  # on a CPU in bfloat16, a third faster than sdpa with its slow backward pass
    held_out_meanings: int = 47
    held_out_rows: int = 64
    search: Size = Size(200, 60, 0)

    def record(self) -> Record:
        """Returns the settings for the results file, with the name of the model instead of its folder."""
        return json.loads(json.dumps({**asdict(self), "model": Path(self.model).name}))


@dataclass(frozen=True)
class Run:
    """One training run."""

    method: Method
    size: Size
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.name}-{self.size.name}-{self.seed}"

    @property
    def key(self) -> Record:
        """The fields that identify its record. A method whose options have changed is another method."""
        options = json.loads(json.dumps(self.method.options))
        return {"method": self.method.name, "options": options, "size": self.size.name, "seed": self.seed}


class Benchmark:
    """The runs of all methods, and their results.

    Args:
        data: The folder of the challenge's files.
        settings: The settings of all runs.
        results: The results file; generated texts go into a folder of the same name.
        reverse: Whether the task is to find the facts in a sentence, instead of writing it.
    """

    def __init__(self, data: Path, settings: Settings, results: Path, reverse: bool = False) -> None:
        self.settings = settings
        self.results = ResultsFile(results, settings.record())
        self.answers = results.with_suffix("")
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
        self.pairs, held_out = hold_out(read_pairs(data / TRAIN_FILE), settings.held_out_meanings)
        sampled = random.Random(0).sample(held_out, settings.held_out_rows)
        if reverse:
            self.pairs, sampled = ([pair.reversed() for pair in pairs] for pairs in (self.pairs, sampled))
        self.held_out = [encode(self.tokenizer, pair) for pair in sampled]
        max_tests = max(size.tests for size in settings.sizes)
        self.tests = random.Random(0).sample(group(read_pairs(data / TEST_FILE)), max_tests)

    def run(self, methods: Sequence[Method]) -> None:
        """Makes the runs that have no record yet."""
        if not self.results.find(kind="base"):
            scores = self._score(self._load(), len(self.tests), "base")
            self.results.add({"kind": "base", "scores": scores})
        runs = [
            Run(method, size, seed)
            for size in self.settings.sizes
            for seed in self.settings.seeds
            for method in methods
        ]
        remaining = [run for run in runs if not self.results.find(kind="run", **run.key)]
        for number, run in enumerate(remaining, start=1):
            scores = self._run_one(run)
            print(f"{number} of {len(remaining)}: {run.name}: {scores}", flush=True)

    def run_variants(self, method: Method) -> None:
        """Measures the held-out loss of a method with one option changed at a time, on all rows with the first seed."""
        size, seed = self.settings.sizes[0], self.settings.seeds[0]
        for variant in variants(method, self._learning_rate(method)):
            run = Run(variant, size, seed)
            if not self.results.find(kind="variant", **run.key):
                learning_rate = self._learning_rate(variant)
                model, _ = self.train(run, learning_rate)
                loss = self.held_out_loss(model)
                self.results.add({"kind": "variant", **run.key, "learning_rate": learning_rate, "held_out_loss": loss})
                print(f"{variant.name}: {loss}", flush=True)

    def _run_one(self, run: Run) -> Record:
        start = time.process_time()
        learning_rate = self._learning_rate(run.method)
        model, losses = self.train(run, learning_rate)
        record = {
            "kind": "run",
            **run.key,
            "learning_rate": learning_rate,
            "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            "train_loss": [round(loss, 3) for loss in losses],
            "held_out_loss": self.held_out_loss(model),
            "scores": self._score(model, run.size.tests, run.name),
            "cpu_seconds": round(time.process_time() - start),
        }
        self.results.add(record)
        return record["scores"]

    def _learning_rate(self, method: Method) -> float:
        """Returns the learning rate with the smallest held-out loss, and searches for it unless that is recorded."""
        if len(method.learning_rates) == 1:
            return method.learning_rates[0]
        losses = {}
        for candidate in method.learning_rates:
            run = Run(method, self.settings.search, seed=0)
            key = {"kind": "search", **run.key, "learning_rate": candidate}
            if not self.results.find(**key):
                model, _ = self.train(run, candidate)
                self.results.add({**key, "held_out_loss": self.held_out_loss(model)})
            losses[candidate] = self.results.find(**key)[0]["held_out_loss"]
        return min(losses, key=lambda candidate: losses[candidate])

    def train(self, run: Run, learning_rate: float) -> tuple[PeftModel, list[float]]:
        """Returns the trained model, and the loss of each step."""
        pairs = random.Random(run.seed).sample(self.pairs, run.size.rows or len(self.pairs))
        base = self._load()
        set_seed(run.seed)
        model = get_peft_model(base, run.method.make_config(pairs, self.settings.model))
        losses = train(
            model,
            [encode(self.tokenizer, pair) for pair in pairs],
            learning_rate=learning_rate,
            size=self.settings.batch_size,
            steps=run.size.steps,
            seed=run.seed,
            pad=self.tokenizer.pad_token_id,
        )
        return model, losses

    def held_out_loss(self, model: PeftModel) -> float:
        """Returns the loss per answer token of rows that no method trains on, in nats."""
        loss = mean_loss(model, self.held_out, 4 * self.settings.batch_size, self.tokenizer.pad_token_id)
        return round(loss, 4)

    def _score(self, model: PreTrainedModel | PeftModel, num_tests: int, name: str) -> Record:
        tests = self.tests[:num_tests]
        answers = generate(model, self.tokenizer, [item.meaning for item in tests])
        self.answers.mkdir(parents=True, exist_ok=True)
        texts = [{"meaning": item.meaning, "answer": answer} for item, answer in zip(tests, answers, strict=True)]
        (self.answers / f"{name}.json").write_text(json.dumps(texts, indent=1), encoding="utf-8")
        return {key: round(value, 3) for key, value in score(answers, [item.sentences for item in tests]).items()}

    def _load(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            self.settings.model,
            dtype=getattr(torch, self.settings.dtype),
            attn_implementation=self.settings.attention,
        )
