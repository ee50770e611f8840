"""What does it cost to serve many? The start, the first request of an adapter, loading one at run time, and memory.

    python benchmarks/cold.py             # SmolLM2, each start three times; writes cold.json
    python benchmarks/cold.py --short     # each once, two minutes on 2 cores
    python benchmarks/cold.py --report    # puts cold.json's table into the main README

Starts real servers with 0, 10 and 1,000 adapters of random numbers, and asks the last one. Its KV cache is small, and full
before memory is measured, so that what grows then is what the plugin keeps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common.adapters import write_prefixes
from benchmarks.common.cli import run
from benchmarks.common.docs_pages import table
from benchmarks.common.interleaving import Measurement, difference, interleave, spread
from benchmarks.common.machine import machine, title
from benchmarks.common.server import BASE, PLUGIN, Server, adapter_options

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 32, 64, 512
OPTIONS = (
    *("--enforce-eager", "--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(NUM_BLOCKS)),
    *("--max-model-len", str(MAX_MODEL_LEN)),
)
ENVIRONMENT = {"PREFIX_SERVE_ALLOW_RUNTIME_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured.

    Args:
        model: Folder or Hub id.
        adapters: How many a server starts with; there is none, some, and the most.
        rounds: How often each server starts.
        tokens: Virtual tokens of these adapters.
        cold: Of how many of them the first request is measured; enough for the later half not to find room in memory
            that the start had freed.
        loads: How many adapters are loaded at run time.
        loaded_tokens: Virtual tokens of those.
    """

    model: str = MODEL
    adapters: tuple[int, ...] = (0, 10, 1000)
    rounds: int = 3
    tokens: int = 16
    cold: int = 1000
    loads: int = 50
    loaded_tokens: int = 64


def short(settings: Settings) -> Settings:
    return dataclasses.replace(settings, rounds=1, loads=15)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="folder or Hub id")

    def measured(options: argparse.Namespace) -> dict[str, Any]:
        settings = Settings(model=options.model)
        return measure(short(settings) if options.short else settings)

    run(parser, "cold", measured, report, arguments)


def measure(settings: Settings) -> dict[str, Any]:
    """Starts the servers, and returns the results."""
    with tempfile.TemporaryDirectory() as name:
        base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16)
        adapters = write_prefixes(Path(name), base, settings.tokens, max(settings.adapters))
        loaded = write_prefixes(Path(name), base, settings.loaded_tokens, settings.loads)
        del base
        most: dict[str, Any] = {}

        def start(number: int) -> Measurement:
            some = dict(list(adapters.items())[:number])
            started = time.perf_counter()
            with Server(PLUGIN, settings.model, server_options(some), ENVIRONMENT) as server:
                ask(server, BASE, [1])
                seconds = time.perf_counter() - started
                memory = memory_of(server)
                if number == max(settings.adapters) and not most:
                    most.update(measure_requests(server, list(adapters)[: settings.cold], loaded))
            return {"seconds": seconds, "bytes": memory}

        def starting(number: int) -> Any:
            return lambda: start(number)

        starts = interleave(
            {str(number): starting(number) for number in settings.adapters}, settings.rounds, warm_ups=0
        )
        return {
            "machine": machine(),
            "settings": {**dataclasses.asdict(settings), "model": Path(settings.model).name},
            **summarize(starts, most["requests"], most["loads"]),
            "file bytes": sum(path.stat().st_size for path in next(iter(adapters.values())).iterdir()),
            "bytes per resident adapter": most["bytes per resident adapter"],
        }


def summarize(
    starts: dict[str, list[Measurement]], requests: dict[str, list[Measurement]], loads: list[float]
) -> dict[str, Any]:
    """Returns what single measurements say.

    Args:
        starts: By number of adapters: `seconds` and `bytes` of each start.
        requests: Of each cold adapter, `seconds` of its first (`cold`) and of its second request (`warm`).
        loads: Seconds of each load at run time.
    """
    fewest, most = min(starts, key=int), max(starts, key=int)
    # A process is never twice as large; the smallest of each kind differ least by chance.
    more = min(start["bytes"] for start in starts[most]) - min(start["bytes"] for start in starts[fewest])
    return {
        "start": {
            number: {
                "seconds": spread([start["seconds"] for start in found]),
                "more": difference(found, starts[fewest], "seconds"),
            }
            for number, found in starts.items()
        },
        "bytes per registered adapter": round(more / (int(most) - int(fewest))),
        "first request": {
            **{kind: milliseconds([one["seconds"] for one in found]) for kind, found in requests.items()},
            "more": milliseconds(
                [cold["seconds"] - warm["seconds"] for cold, warm in zip(*requests.values(), strict=True)]
            ),
        },
        "load": milliseconds(loads),
    }


def milliseconds(seconds: list[float]) -> dict[str, Any]:
    return spread([1000 * value for value in seconds])


def server_options(adapters: dict[str, Path]) -> list[str]:
    return [*OPTIONS, *(adapter_options("--prefix-adapter", adapters) if adapters else [])]


def measure_requests(server: Server, names: list[str], loaded: dict[str, Path]) -> dict[str, Any]:
    """Asks a server whose adapters were never asked for.

    Args:
        names: Adapters whose first two requests are measured.
        loaded: Adapters that are then loaded.
    """
    rng = random.Random(0)

    def prompt(tokens: int = 8) -> list[int]:
        return [rng.randrange(3, 1000) for _ in range(tokens)]

    # Twice as many tokens as the cache holds: each page of it is there now.
    for _ in range(2 * NUM_BLOCKS * BLOCK_SIZE // (MAX_MODEL_LEN // 2)):
        ask(server, BASE, prompt(MAX_MODEL_LEN // 2))
    requests: dict[str, list[Measurement]] = {"cold": [], "warm": []}
    # The first few make ready what all others use.
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
    """Returns the seconds until a request for one token is answered."""
    return _post(server, "completions", {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0})


def load(server: Server, name: str, path: Path) -> float:
    """Returns the seconds until an adapter is loaded."""
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
    """Returns the bytes that the processes of a server have to themselves."""
    parent = psutil.Process(server.process.pid)
    # What is garbage, or comes and goes with a request, is not there at each look.
    return int(
        median(
            sum(process.memory_full_info().uss for process in (parent, *parent.children(recursive=True)))
            for _ in range(5)
        )
    )


def report(found: dict[str, Any]) -> str:
    """Returns the README's part."""
    settings, start, first = found["settings"], found["start"], found["first request"]
    fewest, *others = sorted(start, key=int)
    kv = found["file bytes"]
    rows = [
        ["start to the first answer, without adapters", f"{start[fewest]['seconds']['median']:.1f} s"],
        *([f"more with {int(number):,} adapters", _said(start[number]["more"], "s")] for number in others),
        ["first request of an adapter, more than a second one", _said(first["more"], "ms")],
        [f"loading an adapter of {settings['loaded_tokens']} tokens at run time", _said(found["load"], "ms")],
        ["memory of a registered adapter", f"{found['bytes per registered adapter'] / 2**10:.1f} KiB"],
        ["memory of a resident adapter", f"{found['bytes per resident adapter'] / 2**10:.0f} KiB"],
        ["its files", f"{kv / 2**10:.0f} KiB"],
    ]
    return (
        f"{settings['model']}, adapters of {settings['tokens']} tokens; medians with quartiles.\n\n"
        f"{table(['what', 'cost'], rows)}\n\n{title(found['machine'])}"
    )


def _said(found: dict[str, Any], unit: str) -> str:
    low, high = found["quartiles"]
    return f"{found['median']:.1f} {unit} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
