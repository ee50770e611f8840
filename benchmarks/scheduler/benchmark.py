"""What do prefixes cost besides K/V? The plugin's part in a request's way through the front end and the scheduler.

    python benchmarks/scheduler.py             # some minutes; writes scheduler.json
    python benchmarks/scheduler.py --short     # under a minute
    python benchmarks/scheduler.py --report    # puts scheduler.json's table into the main README

Four kinds of requests take turns: to the base model of vLLM without the plugin (every wrap taken off); to the base model of
an engine with adapters; with a prefix; and behind a text of the prefix's length, in vLLM without the plugin, whose blocks
are cached. Everything but the forward pass is vLLM's own (`ways.py`). Microseconds are CPU time of one thread; what a kind
costs more than the first one is the median over rounds of the difference within a round.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.adapters import write_prefixes
from benchmarks.common.cli import run
from benchmarks.common.docs_pages import table
from benchmarks.common.interleaving import Measurement, difference, interleave, ratio, spread
from benchmarks.common.machine import machine, title

PREFIX_TOKENS = PROMPT_TOKENS = 64
# How many adapters requests take turns with, of those that are registered.
NAMES = 50
ALONE, BESIDE, PREFIX, TEXT = "base model", "base model beside adapters", "prefix", "text, cached"
TARGET = 50
# What a process that has the plugin, but no prefixes, runs for a request.
_IDLE = """
import importlib, json, wrapt
from vllm_plugin import register
register()
from vllm.engine import arg_utils
found = []
for module, method in json.loads(input()):
    target = importlib.import_module(module)
    *path, name = method.split(".")
    for part in path:
        target = getattr(target, part)
    found += [method] * isinstance(vars(target)[name], wrapt.FunctionWrapper)
print(json.dumps(found))
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured.

    Args:
        cells: Numbers of registered adapters and of running requests.
        rounds: How often the kinds take turns.
        requests: How many requests of a kind are on their way together.
    """

    cells: tuple[tuple[int, int], ...] = ((1, 100), (100, 1), (100, 10), (100, 100), (100, 1000), (10_000, 100))
    rounds: int = 40
    requests: int = 50


SHORT = Settings(cells=((1, 1), (100, 100), (10_000, 100)), rounds=10)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def measured(options: argparse.Namespace) -> dict[str, Any]:
        settings = SHORT if options.short else Settings()
        return {
            "machine": machine(),
            "settings": dataclasses.asdict(settings),
            "idle": wraps_when_idle(),
            "cells": measure(settings),
        }

    run(parser, "scheduler", measured, report, arguments)


def measure(settings: Settings) -> list[dict[str, Any]]:
    """Returns the results of each cell."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with tempfile.TemporaryDirectory() as name:
        configs = make_configs(Path(name))
        # The table of adapters only grows.
        return [measure_cell(configs, *cell, settings) for cell in sorted(settings.cells)]


def make_configs(folder: Path) -> dict[bool, Any]:
    """Returns vLLM's config of an engine with adapters (True), and without."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_plugin import prefix_adapters
    from vllm_plugin.patches.install import require

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=8192,
    )
    config.save_pretrained(folder / "model")
    (path,) = write_prefixes(folder, AutoModelForCausalLM.from_config(config), PREFIX_TOKENS, 1).values()
    adapter = prefix_adapters({name_of(0): str(path)})
    require(server=True)
    fields: dict[str, Any] = {
        "dtype": "float32",
        "max_num_seqs": 1100,
        "max_num_batched_tokens": 1 << 17,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }
    return {
        adapters: EngineArgs(
            model=str(folder / "model"), **fields, **(adapter if adapters else {})
        ).create_engine_config()
        for adapters in (True, False)
    }


def name_of(index: int) -> str:
    return f"adapter-{index}"


def register_adapters(vllm_config: Any, number: int) -> None:
    """Registers adapters up to that number, all of one folder, and each under a name and with a digest of its own."""
    from vllm_plugin.adapters.registry import registry_in

    registry = registry_in(vllm_config.kv_transfer_config)
    assert registry is not None
    first, *others = registry.adapters()
    registry.add(
        dataclasses.replace(first, spec=dataclasses.replace(first.spec, name=name_of(index), digest=f"{index:064x}"))
        for index in range(1 + len(others), number)
    )


def measure_cell(configs: Mapping[bool, Any], adapters: int, running: int, settings: Settings) -> dict[str, Any]:
    from benchmarks.scheduler.request_path import BASE, STAGES, STEP, Engine, FrontEnd, Way, with_plugin, without_plugin

    register_adapters(configs[True], adapters)
    ends = {True: FrontEnd(configs[True], with_plugin), False: FrontEnd(configs[False], without_plugin)}
    # Spread over the table.
    names = [name_of(index * adapters // min(NAMES, adapters)) for index in range(min(NAMES, adapters))]

    def way(plugin: bool, models: list[str], shared_tokens: int = 0) -> Way:
        return Way(
            ends[plugin],
            Engine(configs[plugin], with_plugin if plugin else without_plugin),
            models,
            prompt_tokens=PROMPT_TOKENS,
            shared_tokens=shared_tokens,
            running=running,
            steps=max(2, 20 // running),
        )

    ways = {
        ALONE: way(False, [BASE]),
        BESIDE: way(True, [BASE]),
        PREFIX: way(True, names),
        TEXT: way(False, [BASE], PREFIX_TOKENS),
    }

    def measuring(way: Way) -> Any:
        return lambda: way.measure(settings.requests)

    found = interleave({name: measuring(way) for name, way in ways.items()}, settings.rounds, warm_ups=2)
    gc.unfreeze()
    return {
        "adapters": adapters,
        "running": running,
        "message bytes": {name: way.num_bytes() for name, way in ways.items()},
        "microseconds": {name: medians(rounds) for name, rounds in found.items()},
        "more": {
            name: {field: difference(found[name], found[ALONE], field) for field in (*STAGES, "total", STEP)}
            for name in (BESIDE, PREFIX, TEXT)
        },
        "ratio": {name: ratio(found[name], found[ALONE], "total") for name in (BESIDE, PREFIX, TEXT)},
    }


def medians(rounds: list[Measurement]) -> dict[str, float]:
    return {field: spread([measured[field] for measured in rounds])["median"] for field in rounds[0]}


def wraps_when_idle() -> list[str]:
    """Returns which of the methods that the plugin wraps for requests are wrapped in a process without prefixes."""
    from vllm_plugin.patches.requests import ENGINE_SEAMS, SERVER_SEAMS

    seams = [(seam.module, seam.method) for seam in (*ENGINE_SEAMS, *SERVER_SEAMS)]
    child = subprocess.run(
        [sys.executable, "-c", _IDLE], input=json.dumps(seams) + "\n", check=True, capture_output=True, text=True
    )
    return json.loads(child.stdout.splitlines()[-1])


def report(found: dict[str, Any]) -> str:
    """Returns the README's part."""
    rows = [
        [
            f"{cell['adapters']:,}",
            f"{cell['running']:,}",
            f"{cell['microseconds'][ALONE]['total']:.0f}",
            *(_more(cell["more"][kind]["total"]) for kind in (BESIDE, PREFIX, TEXT)),
            *(_more(cell["more"][kind]["step"]) for kind in (PREFIX, TEXT)),
        ]
        for cell in found["cells"]
    ]
    header = [
        "adapters",
        "requests running",
        "a request to the base model",
        "beside adapters",
        "with a prefix",
        "cached text",
        "a step: prefixes",
        "cached text",
    ]
    idle = "none" if not found["idle"] else ", ".join(found["idle"])
    return (
        f"Microseconds of CPU time in vLLM's front end and scheduler, without the model, for {PROMPT_TOKENS} tokens (blocks "
        "of 16): a request without the plugin, and what it costs more, as a median with quartiles, beside adapters, with a "
        f"prefix of {PREFIX_TOKENS} tokens, and behind as much cached text; and what a step of all running requests costs "
        f"more.\n\n{table(header, rows)}\n\nMethods on a request's way that are wrapped in a vLLM that has the plugin and no "
        f"adapters: {idle}.\n\n{title(found['machine'])}"
    )


def _more(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    return f"{found['median']:+.0f} ({low:+.0f} to {high:+.0f})"


if __name__ == "__main__":
    main()
