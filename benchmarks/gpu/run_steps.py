"""Runs steps one after another, each in a process of its own, and keeps what is done."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import machine, versions
from benchmarks.common.results import Record, ResultsFile
from benchmarks.gpu.plan import Step

ROOT = Path(__file__).parents[2]
DONE, FAILED, TOO_LONG, NO_TIME, CANNOT = "done", "failed", "took too long", "no time left", "cannot run here"
# With less left, a step is not begun.
LEAST_SECONDS = 15
WITHOUT_BUDGET = 3600
# Of a step's output, what tells the path that its engine took.
TELLING = re.compile(
    r"Using \S+ attention backend|Using .* backend|cudagraph|Graph capturing|torch.compile takes|Asynchronous|Traceback"
    r"|Error|Model Runner|KV cache size",
    re.IGNORECASE,
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_NO_USAGE_STATS": "1",
}
# Of which kernels may come, beside those that every benchmark records.
PACKAGES = ("triton", "flash-attn", "flashinfer-python")
# Kernels that vLLM takes where it does not know that their packages are missing.
WITHOUT_PACKAGES = {"flashinfer": "VLLM_USE_FLASHINFER_SAMPLER", "deep_gemm": "VLLM_USE_DEEP_GEMM"}
ON_CPU = {"VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


def run_steps(steps: Iterable[Step], results: ResultsFile, dry_run: bool, budget: float | None = None) -> bool:
    """Runs the steps that are not done yet, and records each.

    Args:
        steps: The steps.
        results: The results file; records of failed steps are replaced. The output of all steps is appended to a file of
            the same name that ends in `.log`.
        dry_run: Whether they run on a CPU.
        budget: Seconds for all of them. With it, each step has its own limit as well.

    Returns:
        Whether all are done, but for those that cannot run here.
    """
    deadline = None if budget is None else time.monotonic() + budget
    place = {**machine(), "device": device()}
    place["versions"] |= versions(PACKAGES)
    statuses: list[str] = []
    for step in steps:
        if results.find(step=step.name, status=DONE):
            continue
        limit: float = WITHOUT_BUDGET
        if deadline is not None:
            limit = min(step.seconds, deadline - time.monotonic())
        if step.obstacle is not None:
            found: Record = {"status": CANNOT, "reason": step.obstacle}
        elif limit < LEAST_SECONDS:
            found = {"status": NO_TIME}
        else:
            print(f"=== {step.name}", file=sys.stderr, flush=True)
            found = _run(step, dry_run, limit, results.path.with_suffix(".log"))
        results.records = [record for record in results.records if record["step"] != step.name]
        results.add({"step": step.name, "kind": step.kind, **found, "machine": place})
        statuses.append(found["status"])
        print(f"{step.name}: {found['status']}", file=sys.stderr, flush=True)
    return set(statuses) <= {DONE, CANNOT}


def device() -> dict[str, Any]:
    """Returns what results on a GPU depend on besides the machine; nothing on a CPU."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "memory_gib": round(properties.total_memory / 2**30),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0] if found else None


def _run(step: Step, dry_run: bool, limit: float, log: Path) -> Record:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, said = Path(folder) / "result.json", Path(folder) / "said"
        module = f"benchmarks.gpu.steps.{step.kind}"
        command = [
            sys.executable,
            "-m",
            module,
            *step.arguments,
            "--out",
            str(out),
            *(["--dry-run"] if dry_run else []),
        ]
        code = _wait(command, environment(step, dry_run), limit, said)
        text = said.read_text(encoding="utf-8", errors="replace")
        result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else None
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"\n=== {step.name}: exit status {code}\n{text}")
    if code:
        # The end says why.
        print(text[-2000:], file=sys.stderr, flush=True)
    status = {0: DONE, None: TOO_LONG}.get(code, FAILED)
    lines = [line[-300:] for line in text.splitlines() if TELLING.search(line)][:40]
    seconds = round(time.monotonic() - start, 1)
    # What a step has written before it failed or was ended counts as well.
    return {"status": status, "seconds": seconds, "lines": lines, "result": result}


def environment(step: Step, dry_run: bool) -> dict[str, str]:
    """Returns the environment of a step's process; what the user has set remains."""
    missing = {variable: "0" for package, variable in WITHOUT_PACKAGES.items() if find_spec(package) is None}
    defaults: Mapping[str, str] = {**ENVIRONMENT, **missing, **(ON_CPU if dry_run else {}), **step.environment}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**defaults, **os.environ, "PYTHONPATH": path}


def _wait(command: list[str], variables: dict[str, str], limit: float, said: Path) -> int | None:
    """Runs a command and returns its exit status; None if it took too long."""
    with said.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # The engine's processes, too: the next step needs their memory.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
