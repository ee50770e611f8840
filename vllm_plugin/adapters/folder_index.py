"""The names of the prefixes in a folder with very many: each folder in it is looked into once, and not for each listing."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable

from peft_prefix_ext.checkpoint.format import CONFIG_NAME, WEIGHTS_NAME
from vllm_plugin.adapters.adapter_kinds import PREFIX_TYPES, type_at_a_glance
from vllm_plugin.adapters.file_state import FileState, state_of
from vllm_plugin.adapters.options import is_folder_name

# More links and empty folders than these are looked at again once a second, and not for each listing.
_MANY, _MANY_SECONDS = 1000, 1.0


class FolderIndex:
    """The prefixes among the folders of a folder.

    Args:
        folder: The folder.
        leads_outside: Says of a folder in it whether it, or one of its files, is a link to where nothing may be read.
    """

    def __init__(self, folder: str, leads_outside: Callable[[str], bool]) -> None:
        self._folder, self._leads_outside = folder, leads_outside
        self._lock = threading.Lock()
        self._listed: FileState | None = None
        # By name: the folder's inode, and whether it holds a prefix.
        self._kinds: dict[str, tuple[int, bool]] = {}
        # What may change without the folder's time: folders without an adapter, which may get one, and links, whose target may
        # go. The inode, and the state that it had.
        self._open: dict[str, tuple[int, tuple[FileState | None, ...] | None]] = {}
        self._looked = -math.inf
        self._names: list[str] = []

    def names(self) -> list[str]:
        """Returns the names of the prefixes, sorted: the same list, until they change.

        Takes seconds at first if there are many, so call it in a thread.
        """
        with self._lock:
            state = state_of(self._folder)
            # Its time changes with the names in it.
            if state != self._listed:
                listed = self._list()
                self._listed = state if listed and state is not None and state.is_settled else None
            elif len(self._open) <= _MANY or time.monotonic() >= self._looked + _MANY_SECONDS:
                self._look_again()
            return self._names

    def _list(self) -> bool:
        """Looks into the folders that are new. Returns whether all could be listed."""
        kinds: dict[str, tuple[int, bool]] = {}
        before, self._open = self._open, {}
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    name, known = entry.name, self._kinds.get(entry.name)
                    is_known = known is not None and known[0] == entry.inode()
                    if is_known and name in before:
                        self._open[name] = before[name]
                        is_known = self._state(name) == before[name][1]
                    if known is not None and is_known:
                        kinds[name] = known
                    elif is_folder_name(name) and _is_folder(entry):
                        self._look(name, entry.inode(), kinds)
        except FileNotFoundError:
            kinds = {}
        except OSError:
            # What was there before.
            self._open = before
            return False
        self._kinds = kinds
        self._sort()
        return True

    def _look_again(self) -> None:
        """Looks at what may have changed without the folder's time."""
        changed = [name for name, (_, state) in self._open.items() if self._state(name) != state]
        for name in changed:
            inode, _ = self._open.pop(name)
            self._kinds.pop(name, None)
            self._look(name, inode, self._kinds)
        if changed:
            self._sort()
        self._looked = time.monotonic()

    def _state(self, name: str) -> tuple[FileState | None, FileState | None]:
        path = os.path.join(self._folder, name)
        return state_of(path), state_of(os.path.join(path, CONFIG_NAME))

    def _look(self, name: str, inode: int, kinds: dict[str, tuple[int, bool]]) -> None:
        path = f"{self._folder}/{name}"
        is_link = any(map(os.path.islink, (path, f"{path}/{CONFIG_NAME}", f"{path}/{WEIGHTS_NAME}")))
        state = self._state(name)
        kind = None if is_link and self._leads_outside(path) else type_at_a_glance(path)
        if kind is None or is_link:
            # What has changed just now may have done so behind the look into it.
            settled = all(each is None or each.is_settled for each in state)
            self._open[name] = inode, state if settled else None
        if kind is not None:
            kinds[name] = inode, kind in PREFIX_TYPES

    def _sort(self) -> None:
        names = sorted(name for name, (_, is_prefix) in self._kinds.items() if is_prefix)
        self._names = self._names if names == self._names else names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link that leads to one or may do so later."""
    try:
        return entry.is_symlink() or entry.is_dir()
    except OSError:
        return False
