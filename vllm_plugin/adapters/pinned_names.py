"""The names of a server's pinned adapters, in a file beside the registry.

An engine knows an adapter from its requests, and nobody sends a request for one that was unloaded. So the engine looks
here, and reads a line of names instead of the whole table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from vllm_plugin.adapters.file_state import FileState, state_of

_FILE = "pinned.json"


def write(folder: Path, names: Iterable[str]) -> None:
    """Writes the names. Call it while the registry is locked."""
    new = folder / f"{_FILE}.new"
    new.write_text(json.dumps(sorted(names)), encoding="utf-8")
    new.replace(folder / _FILE)


class PinnedNames:
    """An engine's view of the names.

    Args:
        folder: The registry's folder.
    """

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / _FILE
        self._state: FileState | None = None
        self._names: frozenset[str] | None = None

    def current(self) -> frozenset[str] | None:
        """Returns the names; None if they cannot be read, or none was ever pinned.

        They cannot be read where the server runs on another machine.
        """
        state = state_of(self._path)
        # Each write makes another file.
        if state != self._state:
            self._names, self._state = self._read(), state
        return self._names

    def _read(self) -> frozenset[str] | None:
        try:
            return frozenset(json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
