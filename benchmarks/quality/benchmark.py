"""Does it learn? Trains every method on the E2E challenge, under one budget, and scores what it says.

    python benchmarks/quality.py E2E_FOLDER --model SmolLM2-135M-Instruct   # train what is not in the results yet
    python benchmarks/quality.py E2E_FOLDER --model ... --vary              # what each choice of our prefix does
    python benchmarks/quality.py --report                                   # tables and plot, out of the results

E2E_FOLDER holds the challenge's `devset.csv` (to train on) and `testset_w_refs.csv` (to score on). The runs come in the
order of their weight: all rows before few, one seed of every method before the next seed. Each is written to the results
as soon as it is done, and never done twice: an interrupted benchmark goes on where it was.

Each method chooses its learning rate by the loss on rows of `devset.csv` that no run trains on, with 200 rows and seed 0.
All methods see the same rows in the same order.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from benchmarks.common.results import Record, Records
from benchmarks.quality.dataset import TEST_FILE, TRAIN_FILE, group, hold_out, read_pairs
from benchmarks.quality.methods import METHODS, Method, variants
from benchmarks.quality.report import write_report
from benchmarks.quality.scores import score
from benchmarks.quality.training_loop import encode, generate, mean_loss, train

RESULTS = Path(__file__).parents[1] / "results"
ALL = "all"


@dataclass(frozen=True)
class Size:
    """How much data and how much work: the rows to train on, the steps, the items to score on."""

    rows: int | None
    steps: int
    tests: int

    @property
    def name(self) -> str:
        return ALL if self.rows is None else str(self.rows)


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of all runs."""

    model: str
    sizes: tuple[Size, ...] = (Size(None, 160, 200), Size(200, 80, 100), Size(50, 40, 100))
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 4
    dtype: str = "bfloat16"
    attention: str = "eager"  # in bfloat16 on a CPU a third faster than sdpa, whose backward pass is slow there
    held_out_meanings: int = 47
    held_out_rows: int = 64
    search: Size = Size(200, 60, 0)

    def record(self) -> Record:
        """Returns the settings as they stand in the results: the name of the model, not its folder."""
        return json.loads(json.dumps({**asdict(self), "model": Path(self.model).name}))


@dataclass(frozen=True)
class Run:
    """One training: how, on how much, with which randomness."""

    method: Method
    size: Size
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.name}-{self.size.name}-{self.seed}"

    @property
    def key(self) -> Record:
        """What its record is found by; a method whose options changed is another one."""
        options = json.loads(json.dumps(self.method.options))
        return {"method": self.method.name, "options": options, "size": self.size.name, "seed": self.seed}


class Benchmark:
    """The data, the model and the results, and what is left to do.

    Args:
        data: The folder of the challenge's files.
        settings: The budget.
        results: The file of the results; what the models said goes into a folder of the same name.
    """

    def __init__(self, data: Path, settings: Settings, results: Path) -> None:
        self.settings = settings
        self.records = Records(results, settings.record())
        self.answers = results.with_suffix("")
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
        self.pairs, held_out = hold_out(read_pairs(data / TRAIN_FILE), settings.held_out_meanings)
        sampled = random.Random(0).sample(held_out, settings.held_out_rows)
        self.held_out = [encode(self.tokenizer, pair) for pair in sampled]
        most = max(size.tests for size in settings.sizes)
        self.tests = random.Random(0).sample(group(read_pairs(data / TEST_FILE)), most)

    def go(self, methods: Sequence[Method]) -> None:
        """Makes the runs that have no record yet."""
        if not self.records.find(kind="base"):
            scores = self._score(self._load(), len(self.tests), "base")
            self.records.add({"kind": "base", "scores": scores})
        runs = [
            Run(method, size, seed)
            for size in self.settings.sizes
            for seed in self.settings.seeds
            for method in methods
        ]
        left = [run for run in runs if not self.records.find(kind="run", **run.key)]
        for number, run in enumerate(left, start=1):
            scores = self._run(run)
            print(f"{number} of {len(left)}: {run.name}: {scores}", flush=True)

    def vary(self, method: Method) -> None:
        """Measures what each choice of a method does to its held-out loss, with the most data and the first seed."""
        size, seed = self.settings.sizes[0], self.settings.seeds[0]
        for variant in variants(method, self._learning_rate(method)):
            run = Run(variant, size, seed)
            if not self.records.find(kind="variant", **run.key):
                learning_rate = self._learning_rate(variant)
                model, _ = self._train(run, learning_rate)
                loss = self._held_out_loss(model)
                self.records.add({"kind": "variant", **run.key, "learning_rate": learning_rate, "held_out_loss": loss})
                print(f"{variant.name}: {loss}", flush=True)

    def _run(self, run: Run) -> Record:
        start = time.process_time()
        learning_rate = self._learning_rate(run.method)
        model, losses = self._train(run, learning_rate)
        record = {
            "kind": "run",
            **run.key,
            "learning_rate": learning_rate,
            "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            "train_loss": [round(loss, 3) for loss in losses],
            "held_out_loss": self._held_out_loss(model),
            "scores": self._score(model, run.size.tests, run.name),
            "cpu_seconds": round(time.process_time() - start),
        }
        self.records.add(record)
        return record["scores"]

    def _learning_rate(self, method: Method) -> float:
        """Returns the method's learning rate of the smallest held-out loss, out of the records as far as it is there."""
        if len(method.learning_rates) == 1:
            return method.learning_rates[0]
        losses = {}
        for candidate in method.learning_rates:
            run = Run(method, self.settings.search, seed=0)
            key = {"kind": "search", **run.key, "learning_rate": candidate}
            if not self.records.find(**key):
                model, _ = self._train(run, candidate)
                self.records.add({**key, "held_out_loss": self._held_out_loss(model)})
            losses[candidate] = self.records.find(**key)[0]["held_out_loss"]
        return min(losses, key=lambda candidate: losses[candidate])

    def _train(self, run: Run, learning_rate: float) -> tuple[PeftModel, list[float]]:
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

    def _held_out_loss(self, model: PeftModel) -> float:
        loss = mean_loss(model, self.held_out, 4 * self.settings.batch_size, self.tokenizer.pad_token_id)
        return round(loss, 4)

    def _score(self, model: PreTrainedModel | PeftModel, num_tests: int, name: str) -> Record:
        tests = self.tests[:num_tests]
        answers = generate(model, self.tokenizer, [item.meaning for item in tests])
        self.answers.mkdir(parents=True, exist_ok=True)
        said = [{"meaning": item.meaning, "answer": answer} for item, answer in zip(tests, answers, strict=True)]
        (self.answers / f"{name}.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
        return {key: round(value, 3) for key, value in score(answers, [item.sentences for item in tests]).items()}

    def _load(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            self.settings.model,
            dtype=getattr(torch, self.settings.dtype),
            attn_implementation=self.settings.attention,
        )


def main() -> int:
    args = parse_args()
    if args.data is not None:
        torch.set_num_threads(args.threads)
        benchmark = Benchmark(args.data, Settings(model=args.model), args.results)
        if args.vary:
            benchmark.vary(METHODS[0])
        else:
            benchmark.go([method for method in METHODS if args.only in method.name])
    if args.report:
        print(
            write_report(args.results, METHODS, plot=RESULTS / "quality.png", readme=RESULTS.parents[1] / "README.md")
        )
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder of the E2E challenge's CSV files; none: no training")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "quality.json", help="default: benchmarks/quality.json"
    )
    parser.add_argument("--only", default="", help="only methods with this in their name, such as lora")
    parser.add_argument("--vary", action="store_true", help="instead, change one choice of the first method at a time")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--report", action="store_true", help="write benchmarks/quality.png and the README's table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
