"""A folder that a command works in, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_INPUTS = "inputs.json"


class WorkFolder:
    """Belongs to the inputs of one run, which `inputs.json` in it records.

    Args:
        path: The folder; it is created if needed.
        inputs: What the results depend on, as JSON.
        results: What these results are, for error messages.

    Raises:
        ValueError: If the folder has been made from other inputs, or holds something else.
    """

    def __init__(self, path: str | Path, inputs: dict[str, Any], results: str) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: name a folder to work in.")
        found = read_json(self.path / _INPUTS)
        if found is None:
            if self.path.exists() and any(self.path.iterdir()):
                raise ValueError(f"{self.path} holds something else: name an empty folder, or a new one, to work in.")
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / _INPUTS, inputs)
        elif found != inputs:
            changed = sorted(name for name in found.keys() | inputs.keys() if found.get(name) != inputs.get(name))
            raise ValueError(
                f"{self.path} holds {results} that were made from other inputs ({', '.join(changed)}): name another "
                "folder to work in, or remove this one."
            )


def read_json(path: Path) -> Any:
    """Returns what a file holds, `None` if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, value: Any) -> None:
    """Writes a file that appears whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
