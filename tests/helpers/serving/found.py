"""Adapters in the folder of a running server, which finds them by their names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from helpers.serving import support
from helpers.serving.server import CONFIG, complete
from helpers.serving.support import prompt_ids

PROMPT = prompt_ids(20, seed=60)
# A change is noticed within a second.
NOTICED = 1.5


def write(folder: Path, seed: int, *, tokens: int = 33) -> support.Prefix:
    """Writes an adapter elsewhere, and gives it its name when it is whole."""
    prefix = support.random_prefix(CONFIG, tokens, seed=seed)
    new = folder.with_name(f".{folder.name}")
    support.write_adapter(new, CONFIG, prefix)
    if folder.exists():
        folder.rename(folder.with_name(f".old-{folder.name}"))
    new.rename(folder)
    shutil.rmtree(folder.with_name(f".old-{folder.name}"), ignore_errors=True)
    return prefix


def answer(client: Any, name: str) -> list[str]:
    words: list[str] = complete(client, name, PROMPT).choices[0].text.split()
    return words
