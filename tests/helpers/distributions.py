"""Environments with one distribution of their own, beside what another environment has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = ROOT / ".wheel"  # which `make test-wheel` builds


def archive(suffix: str) -> Path:
    """Returns the one archive that was built, by how its name ends."""
    (found,) = DISTRIBUTIONS.glob(f"*{suffix}")
    return found


def install(archive: Path, folder: Path, beside: Path) -> Path:
    """Makes an environment in `folder`, installs `archive` as a user would, and returns its folder of commands.

    Args:
        archive: A wheel or an sdist.
        folder: Where to make the environment.
        beside: The environment whose Python it has, and whose other packages it sees.
    """
    call(beside / "bin" / "python", "-m", "venv", "--without-pip", folder)
    commands = folder / "bin"
    call(sys.executable, "-m", "pip", "--python", commands / "python", "install", "--quiet", "--no-deps", archive)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    theirs, ours = (Path(call(place / "python", "-c", ask).strip()) for place in (beside / "bin", commands))
    # Behind its own: a package of this name over there, if only an editable one, is not found.
    (ours / "beside.pth").write_text(f"{theirs}\n")
    return commands


def call(*words: str | Path, folder: Path | None = None) -> str:
    """Runs a command, which must succeed, and returns what it printed."""
    done = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
