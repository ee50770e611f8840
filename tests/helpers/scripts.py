"""Runs scripts in other processes with the import path of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
SCRIPTS = TESTS / "helpers" / "training"


def run_script(name: str, *arguments: Any, launcher: Sequence[str] = ()) -> str:
    """Runs `helpers/training/{name}.py` with one thread, and returns what it prints.

    Args:
        launcher: Arguments to Python before the script, such as the module that starts several processes of it.
    """
    paths = [str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPTS / f"{name}.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout


def torchrun(name: str, *arguments: Any) -> None:
    """Runs a script on two processes of this machine."""
    run_script(
        name,
        *arguments,
        launcher=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    )
