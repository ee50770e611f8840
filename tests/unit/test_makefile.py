"""The Makefile takes a Python that fits, and says so if there is none; nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKE = shutil.which("make") or "make"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile, and `bin` with what its shell needs and no Python."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("sh", "rm", "cat"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    return tmp_path


def add_python(clone: Path, name: str, version: str) -> Path:
    """Adds a command that is this Python, but says that it has `version`."""
    path = clone / "bin" / name
    # The Makefile's checks look at `sys.version_info`.
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = -c ] || exit 1\nexec {sys.executable} -c "import sys; sys.version_info = {version}\n'
        f"sys.executable = '{path}'\n$2\"\n"
    )
    path.chmod(0o755)
    return path


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")
    }
    return subprocess.run(
        [MAKE, "--dry-run", *arguments],
        cwd=clone,
        env={**environment, "PATH": str(clone / "bin")},
        capture_output=True,
        text=True,
    )


def test_the_first_python_that_fits_is_taken(clone: Path) -> None:
    add_python(clone, "python3", "(3, 10, 1)")
    add_python(clone, "python3.13", "(3, 13, 0)")
    add_python(clone, "python3.14", "(3, 14, 0)")
    assert "python3.13 -m venv .venv" in make(clone, "demo").stdout
    add_python(clone, "python3", "(3, 14, 0)")
    assert "python3 -m venv .venv" in make(clone, "demo").stdout


def test_no_python_that_fits(clone: Path) -> None:
    add_python(clone, "python3", "(3, 15, 0)")
    made = make(clone, "demo")
    assert made.returncode != 0
    assert "No Python from 3.11 to 3.14 among python3 python3.11" in made.stderr
    assert make(clone, "clean").returncode == 0


@pytest.mark.parametrize("version", ["(3, 10, 9)", "(3, 15, 0)", None])
def test_a_python_that_was_asked_for_must_fit(clone: Path, version: str | None) -> None:
    add_python(clone, "python3", "(3, 12, 0)")
    if version is not None:
        add_python(clone, "other", version)
    made = make(clone, "demo", "PYTHON=other")
    assert made.returncode != 0
    assert "PYTHON=other does not run a Python from 3.11 to 3.14" in made.stderr


def test_another_python_makes_the_environment_anew(clone: Path) -> None:
    mine, other = (add_python(clone, name, "(3, 12, 0)") for name in ("python3.12", "other"))
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to(mine)
    for name in ("pyvenv.cfg", ".installed"):
        (clone / ".venv" / name).touch()
    # The link says that it is `mine`, as the Python of an environment does.
    assert "-m venv" not in make(clone, "demo").stdout
    assert "-m venv" not in make(clone, "demo", f"PYTHON={mine}").stdout
    assert f"{other} -m venv .venv" in make(clone, "demo", f"PYTHON={other}").stdout
