"""Measures the cells: numbers of registered adapters and of running requests."""

from __future__ import annotations

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

from benchmarks.common.interleaving import Measurement, difference, interleave, ratio, spread
from benchmarks.common.random_adapters import write_prefixes

PREFIX_TOKENS = PROMPT_TOKENS = 64
# The number of registered adapters that requests use in turn.
NUM_USED = 50
ALONE, BESIDE, PREFIX, TEXT = "base model", "base model beside adapters", "prefix", "text, cached"
# Prints which of the given methods are patched in a process that has the plugin, but no adapters.
_PATCHES_WHEN_IDLE = """
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
    """The settings of the benchmark.

    Args:
        cells: Pairs of numbers: registered adapters, and running requests.
        rounds: Interleaved rounds of all kinds of requests.
        requests: Requests of one kind that are measured together.
    """

    cells: tuple[tuple[int, int], ...] = ((1, 100), (100, 1), (100, 10), (100, 100), (100, 1000), (10_000, 100))
    rounds: int = 40
    requests: int = 50


SHORT = Settings(cells=((1, 1), (100, 100), (10_000, 100)), rounds=10)


def measure(settings: Settings) -> list[dict[str, Any]]:
    """Returns the results of each cell."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with tempfile.TemporaryDirectory() as name:
        configs = make_configs(Path(name))
        # From few to many: the adapters stay registered.
        return [measure_cell(configs, *cell, settings) for cell in sorted(settings.cells)]


def make_configs(folder: Path) -> dict[bool, Any]:
    """Returns the configs of an engine with adapters (True) and without (False)."""
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
    """Registers adapters up to `number`: all from one folder, but with different names and digests."""
    from vllm_plugin.adapters.registry import registry_in
    from vllm_plugin.adapters.runtime_loading import resolver_of

    registry = registry_in(vllm_config.kv_transfer_config)
    assert registry is not None
    # As its first request does.
    resolver_of(registry, vllm_config).resolve(name_of(0))
    first, *others = registry.adapters()
    registry.add(
        # Nobody looks at their files: they would all have the digest of the first.
        dataclasses.replace(
            first, spec=dataclasses.replace(first.spec, name=name_of(index), digest=f"{index:064x}"), files=None
        )
        for index in range(1 + len(others), number)
    )


def measure_cell(configs: Mapping[bool, Any], adapters: int, running: int, settings: Settings) -> dict[str, Any]:
    from benchmarks.scheduler.request_path import (
        BASE,
        STAGES,
        STEP,
        Engine,
        FrontEnd,
        RequestPath,
        with_plugin,
        without_plugin,
    )

    register_adapters(configs[True], adapters)
    ends = {True: FrontEnd(configs[True], with_plugin), False: FrontEnd(configs[False], without_plugin)}
    # Spread over all registered adapters.
    names = [name_of(index * adapters // min(NUM_USED, adapters)) for index in range(min(NUM_USED, adapters))]

    def path(plugin: bool, models: list[str], shared_tokens: int = 0) -> RequestPath:
        return RequestPath(
            ends[plugin],
            Engine(configs[plugin], with_plugin if plugin else without_plugin),
            models,
            prompt_tokens=PROMPT_TOKENS,
            shared_tokens=shared_tokens,
            running=running,
            steps=max(2, 20 // running),
        )

    paths = {
        ALONE: path(False, [BASE]),
        BESIDE: path(True, [BASE]),
        PREFIX: path(True, names),
        TEXT: path(False, [BASE], PREFIX_TOKENS),
    }

    def measurement(path: RequestPath) -> Any:
        return lambda: path.measure(settings.requests)

    found = interleave({name: measurement(path) for name, path in paths.items()}, settings.rounds, warm_ups=2)
    gc.unfreeze()
    return {
        "adapters": adapters,
        "running": running,
        "message bytes": {name: path.num_bytes() for name, path in paths.items()},
        "microseconds": {name: medians(rounds) for name, rounds in found.items()},
        "more": {
            name: {field: difference(found[name], found[ALONE], field) for field in (*STAGES, "total", STEP)}
            for name in (BESIDE, PREFIX, TEXT)
        },
        "ratio": {name: ratio(found[name], found[ALONE], "total") for name in (BESIDE, PREFIX, TEXT)},
    }


def medians(rounds: list[Measurement]) -> dict[str, float]:
    return {field: spread([measured[field] for measured in rounds])["median"] for field in rounds[0]}


def patches_when_idle() -> list[str]:
    """Returns the methods in the path of a request that the plugin patches in a process without adapters."""
    from vllm_plugin.patches.engine import ENGINE_PATCHES
    from vllm_plugin.patches.patch import vllm_version
    from vllm_plugin.patches.requests import REQUEST_PATCHES
    from vllm_plugin.patches.server import SERVER_PATCHES

    patches = [
        (patch.module, patch.method)
        for patch in (*REQUEST_PATCHES, *ENGINE_PATCHES, *SERVER_PATCHES)
        if patch.is_for(vllm_version())
    ]
    child = subprocess.run(
        [sys.executable, "-c", _PATCHES_WHEN_IDLE],
        input=json.dumps(patches) + "\n",
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(child.stdout.splitlines()[-1])
