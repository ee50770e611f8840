"""Imports go down only, and a circle or an arrow upward is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.scripts import ROOT

PACKAGES = ("peft_prefix_ext", "vllm_plugin")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs `lint-imports` on the packages in a folder."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_imports_go_down(copied: Path) -> None:
    done = lint(copied)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("peft_prefix_ext/config.py", "from peft_prefix_ext.tuner import model"),
        ("peft_prefix_ext/injection/layer.py", "from peft_prefix_ext.tuner import model"),
        ("peft_prefix_ext/checkpoint/reader.py", "import transformers"),
        ("vllm_plugin/front_end/requests.py", "from vllm_plugin.worker import cache_writer"),
        ("vllm_plugin/adapters/loading.py", "from vllm_plugin.patches import install"),
        ("vllm_plugin/worker/cache_writer.py", "from peft_prefix_ext.injection import layer"),
    ],
)
def test_an_import_upward_is_found(module: str, line: str, copied: Path) -> None:
    path = copied / module
    before = path.read_text(encoding="utf-8")
    # Within a function, where a circle would go unnoticed until it is called.
    path.write_text(f"{before}\n\ndef upward():\n    {line}\n", encoding="utf-8")
    try:
        done = lint(copied)
    finally:
        path.write_text(before, encoding="utf-8")
    assert done.returncode == 1
    assert "is not allowed to import" in done.stdout
