"""An adapter that the installed wheel trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.code_blocks import block, commands
from helpers.tiny import tiny_model, tiny_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's first command leaves behind, run on a tiny base model."""
    folder = tmp_path_factory.mktemp("wheel")
    tiny_model("llama", vocab_size=300, head_dim=32).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    rows = [{"prompt": f"name: Aromi {index} =>", "completion": " Aromi serves Italian food."} for index in range(40)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for words in commands(block("bash", "prefix-ext train rows")):
        program = Path(sys.executable).with_name(words[0])
        subprocess.run([program, *words[1:]], cwd=folder, check=True, capture_output=True)
    return folder
