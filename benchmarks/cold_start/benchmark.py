"""Starts the servers, measures them, and summarizes the measurements."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common.interleaving import Measurement, difference, interleave, spread
from benchmarks.common.machine import machine
from benchmarks.common.random_adapters import write_prefixes
from benchmarks.common.server import BASE, PLUGIN, Server, adapter_options

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 32, 64, 512
OPTIONS = (
    *("--enforce-eager", "--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(NUM_BLOCKS)),
    *("--max-model-len", str(MAX_MODEL_LEN)),
)
# The server with a folder, beside those with a number of named adapters.
FOLDER = "folder"
ENVIRONMENT = {"PREFIX_SERVE_ALLOW_RUNTIME_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of the benchmark.

    Args:
        model: Hub id or folder.
        adapters: The number of adapters that each server is given by name.
        in_folder: The number of adapters in the folder of one more server, which finds them by the names in requests.
        rounds: How often each server is started.
        tokens: Virtual tokens of these adapters.
        cold: The number of adapters whose first request is measured. The first of them reuse memory that startup has freed,
            so there must be many.
        loads: The number of adapters that are loaded at run time.
        loaded_tokens: Virtual tokens of those.
    """

    model: str = MODEL
    adapters: tuple[int, ...] = (0, 10, 1000)
    in_folder: int = 10_000
    rounds: int = 3
    tokens: int = 16
    cold: int = 1000
    loads: int = 50
    loaded_tokens: int = 64


def short(settings: Settings) -> Settings:
    return dataclasses.replace(settings, rounds=1, loads=15)


def measure(settings: Settings) -> dict[str, Any]:
    """Starts the servers and returns the results."""
    with tempfile.TemporaryDirectory() as name:
        base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16)
        adapters = write_prefixes(Path(name), base, settings.tokens, max(settings.adapters))
        loaded = write_prefixes(Path(name), base, settings.loaded_tokens, settings.loads)
        del base
        in_folder = fill(Path(name) / FOLDER, list(adapters.values()), settings.in_folder)
        measured: dict[str, dict[str, Any]] = {}

        def start(kind: str) -> Measurement:
            some = {} if kind == FOLDER else dict(list(adapters.items())[: int(kind)])
            options = ["--prefix-adapter-dir", str(in_folder)] if kind == FOLDER else []
            # What an earlier server has read is not known.
            environment = {**ENVIRONMENT, "PREFIX_SERVE_CACHE": tempfile.mkdtemp(dir=name)}
            started = time.perf_counter()
            with Server(PLUGIN, settings.model, [*server_options(some), *options], environment) as server:
                ask(server, BASE, [1])
                seconds = time.perf_counter() - started
                memory = memory_of(server)
                if kind in (FOLDER, most) and kind not in measured:
                    names = [path.name for path in list(in_folder.iterdir())] if kind == FOLDER else list(adapters)
                    names = [name for name in names if name in adapters][: settings.cold]
                    measured[kind] = measure_requests(server, names, loaded if kind == most else {})
            return {"seconds": seconds, "bytes": memory}

        most = str(max(settings.adapters))
        starts = interleave(
            {kind: functools.partial(start, kind) for kind in (*map(str, settings.adapters), FOLDER)},
            settings.rounds,
            warm_ups=0,
        )
        return {
            "machine": machine(),
            "settings": {**dataclasses.asdict(settings), "model": Path(settings.model).name},
            **summarize(starts, measured[most]["requests"], measured[most]["loads"]),
            FOLDER: summarize_folder(starts, measured[FOLDER]["requests"]),
            "file bytes": sum(path.stat().st_size for path in next(iter(adapters.values())).iterdir()),
            "bytes per resident adapter": measured[most]["bytes per resident adapter"],
        }


def summarize(
    starts: dict[str, list[Measurement]], requests: dict[str, list[Measurement]], loads: list[float]
) -> dict[str, Any]:
    """Summarizes the measurements.

    Args:
        starts: `seconds` and `bytes` of each start, by the number of named adapters, or `FOLDER`.
        requests: `seconds` of the first (`cold`) and of the second request (`warm`) to each named adapter.
        loads: Seconds of each run-time load.
    """
    named = {number: found for number, found in starts.items() if number != FOLDER}
    fewest, most = min(named, key=int), max(named, key=int)
    # The size of a process varies from start to start; the minimum varies least.
    more = min(start["bytes"] for start in starts[most]) - min(start["bytes"] for start in starts[fewest])
    return {
        "start": {number: summarize_start(found, starts[fewest]) for number, found in named.items()},
        "bytes per registered adapter": round(more / (int(most) - int(fewest))),
        "first request": summarize_requests(requests),
        "load": milliseconds(loads),
    }


def summarize_folder(starts: dict[str, list[Measurement]], requests: dict[str, list[Measurement]]) -> dict[str, Any]:
    """Summarizes the measurements of the server that finds its adapters in a folder; see `summarize`."""
    fewest = min((number for number in starts if number != FOLDER), key=int)
    return {"start": summarize_start(starts[FOLDER], starts[fewest]), "first request": summarize_requests(requests)}


def summarize_start(found: list[Measurement], fewest: list[Measurement]) -> dict[str, Any]:
    return {
        "seconds": spread([start["seconds"] for start in found]),
        "more": difference(found, fewest, "seconds"),
    }


def summarize_requests(requests: dict[str, list[Measurement]]) -> dict[str, Any]:
    return {
        **{kind: milliseconds([one["seconds"] for one in found]) for kind, found in requests.items()},
        "more": milliseconds(
            [cold["seconds"] - warm["seconds"] for cold, warm in zip(*requests.values(), strict=True)]
        ),
    }


def milliseconds(seconds: list[float]) -> dict[str, Any]:
    return spread([1000 * value for value in seconds])


def fill(folder: Path, adapters: Sequence[Path], number: int) -> Path:
    """Makes a folder of `number` adapters, which share the files of the given ones, and returns it."""
    for index in range(number):
        source = adapters[index % len(adapters)]
        copy = folder / (source.name if index < len(adapters) else f"{source.name}-{index}")
        copy.mkdir(parents=True)
        for file in source.iterdir():
            (copy / file.name).hardlink_to(file)
    return folder


def server_options(adapters: dict[str, Path]) -> list[str]:
    return [*OPTIONS, *(adapter_options("--prefix-adapter", adapters) if adapters else [])]


def measure_requests(server: Server, names: list[str], loaded: dict[str, Path]) -> dict[str, Any]:
    """Measures first requests, resident memory and run-time loading on a server that has had no request to an adapter.

    Args:
        server: The server.
        names: The adapters whose first two requests are measured.
        loaded: The folders of the adapters to load, by name.
    """
    rng = random.Random(0)

    def prompt(tokens: int = 8) -> list[int]:
        return [rng.randrange(3, 1000) for _ in range(tokens)]

    # Twice as many tokens as fit into the cache: afterwards, the OS has allocated all its pages.
    for _ in range(2 * NUM_BLOCKS * BLOCK_SIZE // (MAX_MODEL_LEN // 2)):
        ask(server, BASE, prompt(MAX_MODEL_LEN // 2))
    requests: dict[str, list[Measurement]] = {"cold": [], "warm": []}
    # The first requests initialize what all others use.
    for name in names[:3]:
        ask(server, name, prompt())
    others = names[3:]
    for place, name in enumerate(others):
        if place == len(others) // 2:
            before = memory_of(server)
        for kind in requests.values():
            kind.append({"seconds": ask(server, name, prompt())})
    resident = (memory_of(server) - before) / (len(others) - len(others) // 2)
    loads = [load(server, name, path) for name, path in loaded.items()]
    return {"requests": requests, "loads": loads, "bytes per resident adapter": round(resident)}


def ask(server: Server, model: str, prompt: list[int]) -> float:
    """Returns the seconds of a request for one token."""
    return _post(server, "completions", {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0})


def load(server: Server, name: str, path: Path) -> float:
    """Returns the seconds of loading an adapter."""
    return _post(server, "load_prefix_adapter", {"prefix_name": name, "prefix_path": str(path)})


def _post(server: Server, endpoint: str, body: dict[str, Any]) -> float:
    request = urllib.request.Request(
        f"{server.url}/v1/{endpoint}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started = time.perf_counter()
    with urllib.request.urlopen(request) as response:
        response.read()
    return time.perf_counter() - started


def memory_of(server: Server) -> int:
    """Returns the unique set size of all processes of a server, in bytes."""
    parent = psutil.Process(server.process.pid)
    # The median excludes short-lived allocations.
    return int(
        median(
            sum(process.memory_full_info().uss for process in (parent, *parent.children(recursive=True)))
            for _ in range(5)
        )
    )
