"""An adapter that the installed wheel trained."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.code_blocks import block, run
from helpers.tiny import tiny_model, tiny_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's first code leaves behind, run on a tiny base model."""
    folder = tmp_path_factory.mktemp("wheel")
    tiny_model("llama", vocab_size=300, head_dim=32).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    run(block("python", "get_peft_model"), folder)
    return folder
