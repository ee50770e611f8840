"""Values that change when the files of an adapter are overwritten or replaced: what notices a change without reading."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

from peft_prefix_ext.checkpoint.atomic_save import config_of
from peft_prefix_ext.checkpoint.format import WEIGHTS_NAME

SETTLING_NS = 2_000_000_000


class FileState(NamedTuple):
    """One file. The time of the last status change cannot be set back, as that of the last change of content can."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def is_settled(self) -> bool:
        """Whether a change after this one would show in the times, which some file systems keep in steps of two seconds."""
        now = time.time_ns()
        # Times in the future say that clocks differ, and not that something has changed just now.
        return all(abs(now - changed) > SETTLING_NS for changed in (self.mtime_ns, self.ctime_ns))


def state_of(path: str | Path) -> FileState | None:
    """Returns the state of a file; None if it cannot be looked at."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return FileState(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def file_states(folder: str | Path) -> tuple[FileState | None, FileState | None]:
    """Returns the states of the config and of the weights of the adapter in a folder."""
    folder = Path(folder)
    return state_of(config_of(folder)), state_of(folder / WEIGHTS_NAME)


def folder_state(folder: str | Path) -> str:
    """Returns a text that changes with the config or the weights of the adapter in a folder, also when one is missing.

    While one of them was changed just now, each call returns another text.
    """
    states = file_states(folder)
    texts = ["-" if state is None else ":".join(map(str, state)) for state in states]
    if any(state is not None and not state.is_settled for state in states):
        texts.append(f"read at {time.time_ns()}")
    return " ".join(texts)
