"""How fast is a prefix served? Against the same text in the cache, the base model, LoRA, and transformers.

    python benchmarks/serving.py                                  # SmolLM2: all comparisons, an hour or two on 2 cores
    python benchmarks/serving.py --short                          # some of them, in ten minutes
    python benchmarks/serving.py --shape 8B --rounds 7            # random weights in the shape of a model, for a GPU
    python benchmarks/serving.py --report                         # table and plot, out of the results

All requests of a measurement come at once, with new random prompts of one length, and run to one length. Engines run side by
side in processes of their own, and take turns. Each comparison is written to the results as soon as it is done, and never done
twice: an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common.adapters import write_loras, write_prefixes
from benchmarks.common.interleaving import Measurement, interleave
from benchmarks.common.machine import machine
from benchmarks.common.results import Records
from benchmarks.common.server import PLUGIN, VLLM, Server, adapter_options
from benchmarks.common.shapes import SHAPES, write_shape
from benchmarks.common.workload import Workload
from benchmarks.serving.comparisons import (
    CONTROL,
    NO_PLUGIN,
    PREFIXES,
    SHORT,
    TRANSFORMERS,
    TRANSPORTS,
    Candidate,
    Comparison,
    Settings,
    comparisons,
)
from benchmarks.serving.offline_engine import Engine, transformers_engine, vllm_engine
from benchmarks.serving.report import write_report

RESULTS = Path(__file__).parents[1] / "results"


class Benchmark:
    """Engines and adapters of one model, and what is left to compare.

    Args:
        settings: What is measured.
        records: What was measured before.
        folder: An empty one, for adapters.
    """

    def __init__(self, settings: Settings, records: Records, folder: Path) -> None:
        self.settings, self.records = settings, records
        config = AutoConfig.from_pretrained(settings.model).get_text_config()
        self.workload = Workload(settings.requests, settings.input_tokens, settings.output_tokens, config.vocab_size)
        self.prefixes, self.loras = self._write_adapters(folder)

    def go(self, transports: Iterable[str]) -> None:
        """Makes the comparisons that have no record yet."""
        for transport in transports:
            for comparison in comparisons(self.settings, transport):
                key = {"transport": transport, "comparison": comparison.name}
                if not self.records.find(**key):
                    print(f"{transport}: {comparison.name}", file=sys.stderr, flush=True)
                    measured: dict[str, list[Measurement]] = {}
                    for start in range(comparison.starts):
                        for name, rounds in self._measure(comparison, transport, start).items():
                            measured.setdefault(name, []).extend(rounds)
                    self.records.add({**key, "machine": machine(), "measurements": measured})

    def _measure(self, comparison: Comparison, transport: str, start: int) -> dict[str, list[Measurement]]:
        workload = replace(self.workload, num_requests=comparison.num_requests)
        names = sorted({candidate.engine for candidate in comparison.candidates})
        # They come first in turn: of two engines that are alike, the one started first was 3 % slower here.
        names = names[start % len(names) :] + names[: start % len(names)]
        with ExitStack() as stack:
            engines = {name: stack.enter_context(self._make(transport, name)) for name in names}
            for candidate in comparison.candidates:
                # What is in the cache after many requests, is there from the start.
                everyone = replace(workload, num_requests=max(len(candidate.adapters), 1))
                engines[candidate.engine].run(self._jobs(everyone, candidate, "warm-up"), 1)
            return interleave(
                {
                    candidate.name: self._action(engines[candidate.engine], workload, candidate)
                    for candidate in comparison.candidates
                },
                comparison.rounds,
                seed=start,
            )

    def _action(self, engine: Any, workload: Workload, candidate: Candidate) -> Callable[[], Measurement]:
        rounds = iter(range(sys.maxsize))
        return lambda: engine.run(self._jobs(workload, candidate, str(next(rounds))), workload.output_tokens)

    def _jobs(self, workload: Workload, candidate: Candidate, round_: str) -> Any:
        text = workload.tokens(random.Random(candidate.text_tokens), candidate.text_tokens)
        return workload.jobs(f"{candidate.name} {round_}", candidate.adapters or (None,), text)

    def _make(self, transport: str, name: str) -> Any:
        settings = self.settings
        environment = {"VLLM_PLUGINS": ""} if name in (NO_PLUGIN, CONTROL) else {}
        if name == TRANSFORMERS:
            adapter = next(iter(self.prefixes.values()))
            return Engine(transformers_engine, settings.model, adapter, settings.dtype, settings.threads)
        prefixes = self.prefixes if name == PREFIXES else {}
        loras: dict[str, Path] = {}
        options: dict[str, Any] = {
            **{"dtype": settings.dtype, "block_size": settings.block_size, "max_model_len": settings.context},
            **{"max_num_seqs": max(settings.requests, settings.mix_requests), "load_format": settings.load_format},
            **{"enforce_eager": settings.enforce_eager, "kv_cache_memory_bytes": settings.cache_gib << 30},
        }
        if torch.cuda.is_available():
            # What is claimed beside the cache; several engines share the device.
            options["gpu_memory_utilization"] = 0.1
        if name.startswith("LoRA"):
            _, rank, number = name.split()
            loras = dict(list(self.loras[int(rank)].items())[: int(number)])
            # One more than there are: on CPUs vLLM 0.32 confuses base and adapters if all places are taken.
            options |= {"enable_lora": True, "max_loras": int(number) + 1, "max_lora_rank": max(8, int(rank))}
        if transport == "offline":
            return Engine(vllm_engine, {"model": settings.model, **options}, prefixes, loras, environment=environment)
        arguments = [
            part for option, value in options.items() if value is not False for part in _argument(option, value)
        ]
        if prefixes:
            return Server(
                PLUGIN,
                settings.model,
                [*arguments, *adapter_options("--prefix-adapter", prefixes)],
                environment,
                settings.concurrency,
            )
        arguments += adapter_options("--lora-modules", loras) if loras else []
        return Server(VLLM, settings.model, arguments, environment, settings.concurrency)

    def _write_adapters(self, folder: Path) -> tuple[dict[str, Path], dict[int, dict[str, Path]]]:
        settings = self.settings
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, settings.dtype)
        if settings.load_format == "dummy":
            with torch.device(device):
                base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings.model), dtype=dtype)
            # For transformers, which makes up no weights.
            base.save_pretrained(settings.model)
        else:
            base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, device_map=device)
        prefixes: dict[str, Path] = {}
        for length in dict.fromkeys((settings.mix_tokens, *settings.lengths)):
            number = max(settings.mixes) if length == settings.mix_tokens else 1
            prefixes |= write_prefixes(folder, base, length, number)
        ranks = settings.ranks if settings.loras else ()
        return prefixes, {rank: write_loras(folder, base, rank, max(settings.loras)) for rank in ranks}


def _argument(option: str, value: Any) -> list[str]:
    """Returns an engine's argument as the command line has it."""
    flag = f"--{option.replace('_', '-')}"
    return [flag] if value is True else [flag, str(value)]


def main() -> int:
    args = parse_args()
    if not args.report:
        changes = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__ and value}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if args.shape:
                changes |= {"model": str(write_shape(folder / args.shape, args.shape)), "load_format": "dummy"}
            settings = Settings(**{**(SHORT if args.short else {}), **changes})
            Benchmark(settings, Records(args.results, settings.record()), folder).go(args.transports)
    print(write_report(args.results, args.readme))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="instead of --model: random weights in this shape")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS, help="default: all")
    parser.add_argument("--short", action="store_true", help="fewer of everything")
    for name, field in Settings.__dataclass_fields__.items():
        if isinstance(field.default, int) and not isinstance(field.default, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {field.default}")
    for name in ("lengths", "mixes", "loras", "ranks"):
        default = " ".join(map(str, getattr(Settings, name)))
        parser.add_argument(f"--{name}", type=int, nargs="+", help=f"default: {default}")
    parser.add_argument("--dtype", help="default: bfloat16")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "serving.json", help="default: benchmarks/serving.json"
    )
    parser.add_argument("--readme", type=Path, help="where the report goes, between its markers; by default nowhere")
    parser.add_argument("--report", action="store_true", help="measure nothing; write benchmarks/serving.png")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
