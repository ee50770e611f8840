"""The code of the README, to be run in a test's folder, on a base model of the test's own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOCAL = "./base"


def block(language: str, containing: str) -> str:
    """Returns the one code block of this language with `containing` in it, on the base model in the folder `base`."""
    found = [code for code in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in code]
    assert len(found) == 1, containing
    return found[0].replace(BASE, LOCAL)


def run(code: str, folder: Path) -> str:
    """Runs Python code in a process of its own, and returns what it printed."""
    (folder / "block.py").write_text(code)
    done = subprocess.run([sys.executable, "block.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
