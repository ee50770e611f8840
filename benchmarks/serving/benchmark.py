"""Starts engines, lets the candidates of a comparison take turns on them, and records each comparison."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common.interleaving import Measurement, interleave
from benchmarks.common.machine import machine
from benchmarks.common.random_adapters import write_loras, write_prefixes
from benchmarks.common.results import ResultsFile
from benchmarks.common.server import PLUGIN, VLLM, Server, adapter_options
from benchmarks.common.workload import Workload
from benchmarks.serving.comparisons import (
    CONTROL,
    NO_PLUGIN,
    PREFIXES,
    TRANSFORMERS,
    Candidate,
    Comparison,
    Settings,
    comparisons,
)
from benchmarks.serving.offline_engine import Engine, transformers_engine, vllm_engine


class Benchmark:
    """The comparisons of one model, and their results.

    Args:
        settings: The settings of all comparisons.
        results: The results file.
        folder: An empty folder for adapters.
        names: The comparisons to make; by default all.
    """

    def __init__(
        self, settings: Settings, results: ResultsFile, folder: Path, names: Collection[str] | None = None
    ) -> None:
        self.settings, self.results, self.names = settings, results, names
        config = AutoConfig.from_pretrained(settings.model).get_text_config()
        self.workload = Workload(settings.requests, settings.input_tokens, settings.output_tokens, config.vocab_size)
        self.prefixes, self.loras = self._write_adapters(folder)

    def run(self, transports: Iterable[str]) -> None:
        """Makes the comparisons that have no record yet."""
        for transport in transports:
            for comparison in comparisons(self.settings, transport):
                key = {"transport": transport, "comparison": comparison.name}
                if self._is_wanted(comparison.name) and not self.results.find(**key):
                    print(f"{transport}: {comparison.name}", file=sys.stderr, flush=True)
                    measured: dict[str, list[Measurement]] = {}
                    for start in range(comparison.starts):
                        for name, rounds in self._measure(comparison, transport, start).items():
                            measured.setdefault(name, []).extend(rounds)
                    self.results.add({**key, "machine": machine(), "measurements": measured})

    def _is_wanted(self, name: str) -> bool:
        return self.names is None or name in self.names

    def _measure(self, comparison: Comparison, transport: str, start: int) -> dict[str, list[Measurement]]:
        workload = replace(self.workload, num_requests=comparison.num_requests)
        names = sorted({candidate.engine for candidate in comparison.candidates})
        # Rotate the order: of two equal engines, the one started first was 3 % slower.
        names = names[start % len(names) :] + names[: start % len(names)]
        with ExitStack() as stack:
            engines = {name: stack.enter_context(self._start_engine(transport, name)) for name in names}
            for candidate in comparison.candidates:
                # One request per adapter fills the cache before the measurement.
                one_each = replace(workload, num_requests=max(len(candidate.adapters), 1))
                engines[candidate.engine].run(self._requests(one_each, candidate, "warm-up"), 1)
            return interleave(
                {
                    candidate.name: self._measurement(engines[candidate.engine], workload, candidate)
                    for candidate in comparison.candidates
                },
                comparison.rounds,
                seed=start,
            )

    def _measurement(self, engine: Any, workload: Workload, candidate: Candidate) -> Callable[[], Measurement]:
        rounds = iter(range(sys.maxsize))
        return lambda: engine.run(self._requests(workload, candidate, str(next(rounds))), workload.output_tokens)

    def _requests(self, workload: Workload, candidate: Candidate, round_: str) -> Any:
        text = workload.tokens(random.Random(candidate.text_tokens), candidate.text_tokens)
        return workload.requests(f"{candidate.name} {round_}", candidate.adapters or (None,), text)

    def _start_engine(self, transport: str, name: str) -> Any:
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
            # Several engines share the device; the cache is set by kv_cache_memory_bytes.
            options["gpu_memory_utilization"] = 0.1
        if name.startswith("LoRA"):
            _, rank, number = name.split()
            loras = dict(list(self.loras[int(rank)].items())[: int(number)])
            # One more than needed: on CPUs, vLLM 0.32 confuses base model and adapters when all slots are taken.
            options |= {"enable_lora": True, "max_loras": int(number) + 1, "max_lora_rank": max(8, int(rank))}
        if transport == "offline":
            return Engine(vllm_engine, {"model": settings.model, **options}, prefixes, loras, environment=environment)
        arguments = [
            part for option, value in options.items() if value is not False for part in _command_line(option, value)
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
            if self._is_wanted(TRANSFORMERS):
                # transformers needs the weights; vLLM makes up its own.
                base.save_pretrained(settings.model)
        else:
            base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, device_map=device)
        prefixes: dict[str, Path] = {}
        for length in dict.fromkeys((settings.mix_tokens, *settings.lengths)):
            number = max(settings.mixes) if length == settings.mix_tokens else 1
            prefixes |= write_prefixes(folder, base, length, number)
        ranks = settings.ranks if settings.loras else ()
        loras = {rank: write_loras(folder, base, rank, max(settings.loras)) for rank in ranks}
        del base
        if device == "cuda":
            # The engines, in processes of their own, need what torch keeps of it.
            torch.cuda.empty_cache()
        return prefixes, loras


def _command_line(option: str, value: Any) -> list[str]:
    """Returns an engine argument as command-line arguments."""
    flag = f"--{option.replace('_', '-')}"
    return [flag] if value is True else [flag, str(value)]
