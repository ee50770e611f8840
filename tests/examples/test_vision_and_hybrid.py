"""The second example: a vision-language model and a hybrid, trained, served, and asked over HTTP with an image."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from helpers.scripts import ROOT


def test_every_token_is_that_of_peft(tmp_path: Path) -> None:
    command = [sys.executable, "examples/vision_and_hybrid.py", "--output", str(tmp_path), "--steps", "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for name, result in results.items():
        first, last = result["loss"]
        assert last < first / 2, name
        assert result["equal"] == result["questions"]
    # The prefix has learned from the pictures, which the base model cannot name.
    assert results["vision"]["right"] == {"base": 0, "colours": 4}
