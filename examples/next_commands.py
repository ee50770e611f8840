"""Commands to continue with after the demo: start its server again, and query each of its prefixes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from e2e import Example
from serve import MAX_NEW_TOKENS, server_command, server_environment

PORT = 8000


def commands(model: str, adapters: Mapping[str, Path], examples: Mapping[str, Example]) -> list[str]:
    """Returns shell commands that work in any folder: one that starts the server, and one query for each adapter.

    Args:
        model: The base model: a folder or a hub id.
        adapters: The folder of each adapter, by its name.
        examples: What to ask each adapter, in the format that it was trained with.
    """
    model = str(Path(model).absolute()) if Path(model).is_dir() else model
    folders = {name: folder.absolute() for name, folder in adapters.items()}
    settings = [f"{name}={value}" for name, value in server_environment(model).items()]
    return [
        shlex.join([*settings, *server_command(model, folders, PORT)]),
        *(_question(name, examples[name]) for name in adapters),
    ]


def _question(name: str, example: Example) -> str:
    body = {"model": name, "messages": example.messages, "temperature": 0, "max_tokens": MAX_NEW_TOKENS}
    url = f"http://localhost:{PORT}/v1/chat/completions"
    data = json.dumps(body, ensure_ascii=False)
    return shlex.join(["curl", url, "--header", "Content-Type: application/json", "--data", data])
