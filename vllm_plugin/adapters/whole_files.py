"""Reads an adapter while nobody writes its files: one that is overwritten in place may be half old and half new, and look whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from vllm_plugin.adapters.file_state import FileState, file_states
from vllm_plugin.errors import PrefixServeError

T = TypeVar("T")
# A program that writes a file is seldom still for so long. Longer than the steps in which a kernel keeps the time.
STILL_NS = 200_000_000
# How long a request waits for a program that goes on writing.
_MAX_SECONDS = 1.0


def read_whole(name: str, folder: str, read: Callable[[], T]) -> T:
    """Calls `read` when the files of an adapter have come to rest, and again if they have changed meanwhile.

    Args:
        name: The name of the adapter.
        folder: Its local folder.
        read: Reads it.

    Raises:
        PrefixServeError: If the files go on changing. Also what `read` raises.
    """
    deadline = time.monotonic() + _MAX_SECONDS
    while True:
        states = file_states(folder)
        if not (wait := _seconds_until_still(states)):
            error, result = None, None
            try:
                result = read()
            except PrefixServeError as problem:
                error = problem
            if file_states(folder) == states:
                if error is not None:
                    raise error
                return result  # type: ignore[return-value]
        if time.monotonic() + wait > deadline:
            raise PrefixServeError(
                f"Prefix adapter {name!r}: its files in {folder} are being written; ask again when they are whole, and write "
                "the next version to a folder of its own that is then renamed."
            )
        time.sleep(wait)


def _seconds_until_still(states: tuple[FileState | None, ...]) -> float:
    now = time.time_ns()
    ages = [now - max(state.mtime_ns, state.ctime_ns) for state in states if state is not None]
    # Times in the future say that clocks differ.
    return max((STILL_NS - age for age in ages if 0 <= age < STILL_NS), default=0) / 1e9
