"""The steps, the most telling first, so that a machine that is lent for minutes shows the most."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

PARITY, SERVING, DISTILLED, TRAINING, KERNELS = "parity", "serving", "distilled", "training", "kernels"
# Triton multiplies float32 matrices in TF32 otherwise, which is not exact.
EXACT = {"TRITON_F32_DEFAULT": "ieee"}
TRITON: dict[str, Any] = {"attention_backend": "TRITON_ATTN"}


@dataclass(frozen=True)
class Step:
    """One step, a process of its own.

    Args:
        name: Its name in the results.
        kind: The module in `benchmarks/gpu/steps/`.
        arguments: Its command line, without `--out` and `--dry-run`.
        seconds: About how long it takes on an H100, compilation included; its limit where time is scarce.
        environment: Variables of its process.
        on_cpu: Whether a dry run includes it.
        needs: A package without which it cannot run.
        by_default: Whether it runs if no steps are named.
    """

    name: str
    kind: str
    arguments: tuple[str, ...] = ()
    seconds: int = 60
    environment: Mapping[str, str] = field(default_factory=dict)
    on_cpu: bool = False
    needs: str | None = None
    by_default: bool = True

    @property
    def obstacle(self) -> str | None:
        """Why it cannot run here; None if it can."""
        return None if self.needs is None or find_spec(self.needs) else f"{self.needs} is not installed"


def plan(dry_run: bool) -> list[Step]:
    """Returns all steps.

    Args:
        dry_run: Whether to leave out what needs CUDA, and to make the others small.
    """
    steps = _dry_steps() if dry_run else [*_first(), *_speed(), *_more_checks(), *_more_speed(), *_if_the_first_fail()]
    return [step for step in steps if step.on_cpu or not dry_run]


def _first() -> list[Step]:
    return [
        Step("kernels", KERNELS),
        # vLLM's defaults on a GPU: graphs, compilation, async scheduling, blocks of 16 tokens.
        _parity("float32 llama", "llama", "float32", 100),
        _parity("bfloat16 0.5B", "0.5B", "bfloat16", 100),
    ]


def _speed() -> list[Step]:
    return [
        _serving("serving 8B", "8B", 150, "lengths", "LoRA, 64"),
        _training("training 3B", 70, "--shape", "3B"),
    ]


def _more_checks() -> list[Step]:
    return [
        # Chunked prompts, and a batch that is too small for all requests.
        _parity("float32 mistral, chunks", "mistral", "float32", 70, max_num_batched_tokens=128, max_num_seqs=8),
        _parity("float32 gemma3", "gemma3", "float32", 70),
        _parity("bfloat16 Triton attention, sleep", "0.5B", "bfloat16", 80, "--sleep", **TRITON),
        _parity("fp8 cache", "0.5B", "bfloat16", 80, kv_cache_dtype="fp8", **TRITON),
        _parity("bfloat16 8B", "8B", "bfloat16", 110),
        _parity("bfloat16 hybrid", "hybrid", "bfloat16", 120),
        _parity("bfloat16 gated delta", "gated delta", "bfloat16", 120),
        # Kernels for latents take half precision only.
        _parity("bfloat16 MLA", "MLA", "bfloat16", 100, block_size=64),
    ]


def _more_speed() -> list[Step]:
    flash = ("--attention", "flash_attention_2")
    return [
        _serving("serving 0.5B", "0.5B", 200, "lengths", "mixes", "LoRA, 1", "LoRA, 8", "LoRA, 64", "base"),
        _serving("serving 8B, more", "8B", 200, "mixes", "LoRA, 1", "LoRA, 8"),
        _serving("serving hybrid", "hybrid", 200, "lengths", "mixes"),
        _serving("serving MLA", "MLA", 200, "lengths", "mixes"),
        Step("distilled 8B", DISTILLED, ("--shape", "8B"), 150),
        _training("training 0.5B", 60, "--shape", "0.5B"),
        _training("training 0.5B, flash attention", 60, "--shape", "0.5B", *flash, needs="flash_attn"),
        _training("training 3B, flash attention", 80, "--shape", "3B", *flash, needs="flash_attn"),
        _training("training 0.5B, torch.compile", 300, "--shape", "0.5B", "--compiled"),
        _training("training 3B, torch.compile", 400, "--shape", "3B", "--compiled"),
    ]


def _if_the_first_fail() -> list[Step]:
    """Returns the first check without the compiler, and without graphs: they tell whose fault it is."""
    no_compiler = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return [
        _parity(
            "float32 llama, graphs without compiler",
            "llama",
            "float32",
            80,
            by_default=False,
            compilation_config=no_compiler,
        ),
        _parity("float32 llama, eager", "llama", "float32", 60, by_default=False, enforce_eager=True),
    ]


def _dry_steps() -> list[Step]:
    """Returns one step of each kind that a CPU can run.

    vLLM's CPU build is wrong about hybrids and latents in ways that have nothing to do with prefixes, so these are not here.
    """
    few = ("--lengths", "33", "64", "--new-tokens", "6")
    return [
        *(
            Step(f"float32 {model}", PARITY, ("--model", model, "--dtype", "float32", *few), on_cpu=True)
            for model in ("llama", "mistral", "gemma3")
        ),
        Step("serving", SERVING, ("--comparisons", "lengths", "LoRA, 4"), on_cpu=True),
        Step("distilled", DISTILLED, on_cpu=True),
        Step("training", TRAINING, ("--shape", "0.5B"), on_cpu=True),
    ]


def _parity(
    name: str, model: str, dtype: str, seconds: int, *flags: str, by_default: bool = True, **options: Any
) -> Step:
    """Returns a check of parity; `options` are arguments of vLLM's `LLM`."""
    arguments = ("--model", model, "--dtype", dtype, "--options", json.dumps(options), *flags)
    environment = EXACT if dtype == "float32" else {}
    return Step(name, PARITY, arguments, seconds, environment, by_default=by_default)


def _serving(name: str, shape: str, seconds: int, *comparisons: str) -> Step:
    return Step(name, SERVING, ("--shape", shape, "--comparisons", *comparisons), seconds)


def _training(name: str, seconds: int, *arguments: str, needs: str | None = None) -> Step:
    return Step(name, TRAINING, arguments, seconds, needs=needs)
