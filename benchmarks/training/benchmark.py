"""How fast does it train, and in how much memory? One training step of every method, side by side.

    python benchmarks/training.py                          # all cells of the table; goes on where it was interrupted
    python benchmarks/training.py --short --results short.json
    python benchmarks/training.py --shape 3B --length 512 --results 3b.json
    python benchmarks/training.py --report                 # table and plot, out of the results

A cell is a batch size and a number of virtual tokens. In each, all methods train the same batch on the same weights, of
which there is one copy in memory, in rounds: every method once per round, in a new order each time. What counts are
ratios within rounds, to the limit (the frozen model's forward pass and the gradient of its input) and to stock PEFT.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.interleaving import Measurement, interleave, ratio
from benchmarks.common.machine import machine
from benchmarks.common.results import Record, Records
from benchmarks.common.shapes import SHAPES
from benchmarks.training.footprint import footprint
from benchmarks.training.report import write_report
from benchmarks.training.steps import LIMIT, METHODS, STOCK_FLAT, STOCK_MLP, TrainingStep, load

RESULTS = Path(__file__).parents[1] / "results"
REFERENCES = (LIMIT, STOCK_FLAT, STOCK_MLP)


@dataclass(frozen=True)
class Settings:
    """What decides the outcome.

    Args:
        model: A folder, a name on the Hub or one of `SHAPES`.
        layers: How many of its layers there are; `None` for all.
        batches: Rows per step.
        prefixes: Virtual tokens.
        length: Real tokens per row; no row has padding.
        rounds: How often each method is measured in a cell, after one round that warms up.
        dtype: Of the weights.
        threads: Of torch, on a CPU.
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

    def record(self) -> Record:
        """Returns the settings as they stand in the results: the name of the model, not its folder."""
        lists = {"batches": [*self.batches], "prefixes": [*self.prefixes]}
        return {**asdict(self), **lists, "model": Path(self.model).name}


# Fewer layers, which all methods have in common.
SHORT: dict[str, Any] = {"layers": 4, "batches": (1, 16), "prefixes": (16, 1024), "rounds": 3}


class Benchmark:
    """The model, the results, and what is left to do.

    Args:
        settings: See there.
        results: The file of the results, one record per cell.
    """

    def __init__(self, settings: Settings, results: Path) -> None:
        self.settings = settings
        self.records = Records(results, settings.record())
        self.device = torch.device(settings.device)
        self.base = load(settings.model, getattr(torch, settings.dtype), self.device, settings.layers)

    def go(self) -> None:
        """Measures the cells that have no record yet, the small ones first."""
        cells = [(batch, prefix) for batch in self.settings.batches for prefix in self.settings.prefixes]
        for batch, prefix in sorted(cells, key=lambda cell: cell[0] * (cell[1] + self.settings.length)):
            if not self.records.find(batch=batch, prefix=prefix):
                start = time.perf_counter()
                self.records.add(
                    {"batch": batch, "prefix": prefix, **self._measure(batch, prefix), "machine": machine()}
                )
                print(f"batch {batch}, prefix {prefix}: {time.perf_counter() - start:.0f} s", flush=True)

    def _measure(self, batch: int, prefix: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.base.config.vocab_size, (batch, self.settings.length), generator=generator).to(
            self.device
        )
        steps = {name: TrainingStep(self.base, method, prefix) for name, method in METHODS.items()}
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


def main() -> int:
    args = parse_args()
    if not args.report:
        torch.set_num_threads(args.threads)
        changes = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
        settings = Settings(**{**changes, **(SHORT if args.short else {})})
        Benchmark(settings, args.results).go()
    print(write_report(args.results, readme=args.readme))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    own = Settings("HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--model", default=own.model, help="hub id or folder")
    parser.add_argument("--shape", dest="model", choices=sorted(SHAPES), help="instead of --model: random weights")
    parser.add_argument("--layers", type=int, help="only so many of its layers")
    parser.add_argument("--batches", type=int, nargs="+", default=own.batches, help="rows per step (default: 1 4 16)")
    parser.add_argument("--prefixes", type=int, nargs="+", default=own.prefixes, help="default: 16 128 1024")
    parser.add_argument("--length", type=int, default=own.length, help="real tokens per row (default: 64)")
    parser.add_argument("--rounds", type=int, default=own.rounds, help="that count (default: 5)")
    parser.add_argument(
        "--dtype", default="bfloat16" if has_gpu else own.dtype, help="default: bfloat16 on a GPU, else float32"
    )
    parser.add_argument(
        "--device", default="cuda" if has_gpu else own.device, help="default: cuda where there is a GPU"
    )
    parser.add_argument("--threads", type=int, default=own.threads, help="of torch (default: 2)")
    parser.add_argument("--short", action="store_true", help="minutes: 4 layers, batch 1 and 16, prefix 16 and 1024")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "training.json", help="default: benchmarks/training.json"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing; write benchmarks/training.png")
    parser.add_argument("--readme", type=Path, help="where the report goes, between its markers; by default nowhere")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
