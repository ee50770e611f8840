"""The third example: a page of Python's manual as a short prefix, on a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.chats import CHATML, tokenizer_with
from helpers.scripts import ROOT
from helpers.tiny import tiny_model
from peft_prefix_ext.checkpoint import read_prefix


def test_a_page_of_the_manual_becomes_a_prefix(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML)
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    questions = [f"What does the manual say about number {number}?" for number in range(20)]
    (tmp_path / "questions.txt").write_text("\n".join(questions), encoding="utf-8")
    options = {
        "model": tmp_path / "model",
        "topic": "assert",
        "queries": tmp_path / "questions.txt",
        "output": tmp_path,
        "num-virtual-tokens": 16,
        "max-new-tokens": 8,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "examples/distill_manual.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    prefix = read_prefix(tmp_path / "adapter")
    assert prefix.num_virtual_tokens == 16
    assert prefix.config["context"]["sources"].keys() == {"assert"}
    for row in ("nothing", "full context", "truncation", "prefix"):
        assert f"| {row} |" in done.stdout, row
    assert (tmp_path / "adapter" / "report.json").exists()
