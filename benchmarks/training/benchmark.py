"""Measures the cells and records each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.interleaving import Measurement, interleave, ratio
from benchmarks.common.machine import machine
from benchmarks.common.results import Record, ResultsFile
from benchmarks.training.footprint import footprint
from benchmarks.training.steps import LIMIT, METHODS, STOCK_FLAT, STOCK_MLP, TrainingStep, load

REFERENCES = (LIMIT, STOCK_FLAT, STOCK_MLP)


@dataclass(frozen=True)
class Settings:
    """The settings of all cells.

    Args:
        model: A Hub id, a folder or one of `SHAPES`.
        layers: The number of layers to use; None for all.
        batches: Batch sizes.
        prefixes: Numbers of virtual tokens.
        length: Real tokens per row, without padding.
        rounds: Rounds per cell, after one warm-up round.
        dtype: The data type of the weights.
        device: Where to train.
        threads: The number of torch threads on a CPU.
        attention: transformers' `attn_implementation`; None for its default.
        compiled: Whether `torch.compile` runs the model.
    """

    model: str
    layers: int | None = None
    batches: tuple[int, ...] = (1, 4, 16)
    prefixes: tuple[int, ...] = (16, 128, 1024)
    length: int = 64
    rounds: int = 5
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    attention: str | None = None
    compiled: bool = False

    def record(self) -> Record:
        """Returns the settings for the results file, with the name of the model instead of its folder."""
        lists = {"batches": [*self.batches], "prefixes": [*self.prefixes]}
        fields = {**asdict(self), **lists, "model": Path(self.model).name}
        # Older results lack these, and were made with their defaults.
        newer = {"attention": None, "compiled": False}
        return {name: value for name, value in fields.items() if name not in newer or value != newer[name]}


# Fewer layers: all methods share them.
SHORT: dict[str, Any] = {"layers": 4, "batches": (1, 16), "prefixes": (16, 1024), "rounds": 3}


class Benchmark:
    """The cells of one model, and their results.

    Args:
        settings: The settings of all cells.
        results: The results file, with one record per cell.
        methods: The names of the methods, of `METHODS`; the references are always measured.
    """

    def __init__(self, settings: Settings, results: Path, methods: Sequence[str] = tuple(METHODS)) -> None:
        self.settings, self.methods = settings, [name for name in METHODS if name in {*methods, *REFERENCES}]
        self.results = ResultsFile(results, settings.record())
        self.device = torch.device(settings.device)
        self.base = load(
            settings.model, getattr(torch, settings.dtype), self.device, settings.layers, settings.attention
        )

    def run(self) -> None:
        """Measures the cells that have no record yet, from small to large."""
        cells = [(batch, prefix) for batch in self.settings.batches for prefix in self.settings.prefixes]
        for batch, prefix in sorted(cells, key=lambda cell: cell[0] * (cell[1] + self.settings.length)):
            if not self.results.find(batch=batch, prefix=prefix):
                start = time.perf_counter()
                self.results.add(
                    {"batch": batch, "prefix": prefix, **self._measure(batch, prefix), "machine": machine()}
                )
                print(f"batch {batch}, prefix {prefix}: {time.perf_counter() - start:.0f} s", flush=True)

    def _measure(self, batch: int, prefix: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.base.config.vocab_size, (batch, self.settings.length), generator=generator).to(
            self.device
        )
        compiled = self.settings.compiled
        steps = {name: TrainingStep(self.base, METHODS[name], prefix, compiled) for name in self.methods}
        candidates = {name: partial(self._timed, step, ids) for name, step in steps.items()}
        measured = interleave(candidates, self.settings.rounds)
        return {
            "methods": {
                name: {
                    "trained": sum(parameter.numel() for parameter in step.trained),
                    **footprint(partial(step.forward, ids), step.update, self.device),
                    "seconds": [round(one["seconds"], 5) for one in measured[name]],
                    "ratios": {other: ratio(measured[name], measured[other], "seconds") for other in REFERENCES},
                }
                for name, step in steps.items()
            }
        }

    def _timed(self, step: TrainingStep, ids: torch.Tensor) -> Measurement:
        self._synchronize()
        start = time.perf_counter()
        step.update(step.forward(ids))
        self._synchronize()
        return {"seconds": time.perf_counter() - start}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
