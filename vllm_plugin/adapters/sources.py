"""Where an adapter is looked for by the name that a request gives: folders, owners on the Hub, remote storage.

A name comes from a client. It is the name of a folder within a source, and never a path.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from peft_prefix_ext.checkpoint.atomic_save import config_of
from peft_prefix_ext.checkpoint.format import WEIGHTS_NAME, PrefixCheckpointError
from peft_prefix_ext.checkpoint.hub import download, reason_of
from vllm_plugin.adapters.adapter_kinds import PREFIX_TYPES, type_on_hub
from vllm_plugin.adapters.file_state import folder_state
from vllm_plugin.adapters.folder_index import FolderIndex
from vllm_plugin.adapters.options import is_folder_name
from vllm_plugin.adapters.remote import filesystem, is_remote, remote_state
from vllm_plugin.errors import AdapterNotFoundError, PrefixServeError

_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


class Found(NamedTuple):
    """An adapter in a source.

    Args:
        source: Where it lies, in the form of `PATH_OR_REPO`.
        path: What opens it: a local folder, or an address of remote storage.
        state: A text that changes whenever its files do.
    """

    source: str
    path: str
    state: str


class Source(Protocol):
    """Where adapters are looked for.

    Args:
        refresh_seconds: After how long an adapter that was found is looked at again.
        is_local: Whether that takes no network, so that requests wait for it. Otherwise they go on with what is known.
    """

    refresh_seconds: float
    is_local: bool

    def find(self, name: str) -> Found | None:
        """Returns what has this name; None if nothing has.

        Raises:
            PrefixServeError: If it may not be read, or the source cannot be asked.
        """

    def names(self) -> list[str]:
        """Returns the names of its prefixes, as far as they can be listed: the same list, until they change."""


class FolderSource:
    """The prefixes in a local folder, each in a folder of its own.

    Args:
        folder: The folder.
        within: Folders that links may lead to; `folder` itself always.
    """

    refresh_seconds, is_local = 1.0, True

    def __init__(self, folder: str, within: Sequence[str] = ()) -> None:
        self.folder = os.path.abspath(os.path.expanduser(folder))
        self._within = (self.folder, *map(os.path.expanduser, within))
        self._index = FolderIndex(self.folder, self._leads_outside)

    def find(self, name: str) -> Found | None:
        if not is_folder_name(name):
            return None
        place = os.path.join(self.folder, name)
        if not os.path.isdir(place):
            return None
        if self._leads_outside(place):
            raise AdapterNotFoundError(
                f"Prefix adapter {name!r} links to a place outside of the folders of --prefix-adapter-dir; name that place as well."
            )
        # Another link may lead elsewhere by the time that it is opened.
        path = os.path.realpath(place)
        return Found(place, path, f"{path} {folder_state(path)}")

    def _leads_outside(self, place: str) -> bool:
        """Whether the folder of an adapter, or one of its files, is a link to what the operator has not named."""
        path = os.path.realpath(place)
        files = (os.path.realpath(file) for file in (config_of(Path(path)), os.path.join(path, WEIGHTS_NAME)))
        roots = [os.path.realpath(root) for root in self._within]
        return not all(_is_below(each, roots) for each in (path, *files))

    def names(self) -> list[str]:
        return self._index.names()


class RemoteSource:
    """The prefixes in a folder of remote storage, each in a folder of its own.

    Args:
        url: The address of the folder.
    """

    refresh_seconds, is_local = 30.0, False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._names: list[str] = []
        self._listed = -float("inf")

    def find(self, name: str) -> Found | None:
        if not is_folder_name(name):
            return None
        url = f"{self.url}/{name}"
        try:
            state = remote_state(url)
        except PrefixCheckpointError as error:
            raise AdapterNotFoundError(f"Prefix adapter {name!r}: {error}") from error
        return None if state is None else Found(url, url, state)

    def names(self) -> list[str]:
        """Lists the folders without a look into them, and seldom: a listing of remote storage takes long."""
        if time.monotonic() - self._listed > self.refresh_seconds:
            try:
                files, path = filesystem(self.url)
                files.invalidate_cache()
                rows = files.ls(path, detail=True)
            except Exception:
                # The storage cannot be reached: what was there before.
                rows = None
            if rows is not None:
                found = (row["name"].rstrip("/").rpartition("/")[2] for row in rows if row.get("type") == "directory")
                names = sorted(name for name in found if is_folder_name(name))
                self._names = self._names if names == self._names else names
            self._listed = time.monotonic()
        return self._names


class HubSource:
    """The prefixes of some owners on the Hub: a request names `OWNER/name`.

    Args:
        allowed: Owners, and single repositories `OWNER/name`.
    """

    refresh_seconds, is_local = 300.0, False

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(allowed)
        self._names: list[str] = []

    def find(self, name: str) -> Found | None:
        if not _REPO.fullmatch(name) or not self._allowed & {name, name.partition("/")[0]}:
            return None
        try:
            # Its config first: it may be a LoRA of many GiB. Never a local folder of that name.
            if type_on_hub(name) not in PREFIX_TYPES:
                return None
            folder = os.path.realpath(download(name))
        except Exception as error:
            raise AdapterNotFoundError(
                f"Prefix adapter {name!r} cannot be downloaded from the Hub ({reason_of(error)})."
            ) from error
        # Each commit has a folder of its own.
        return Found(name, folder, folder)

    def names(self) -> list[str]:
        return self._names


def make_sources(folders: Sequence[str], owners: Sequence[str]) -> list[Source]:
    """Returns the sources that an operator has named, in this order.

    Args:
        folders: Local folders, and addresses of remote ones.
        owners: Owners and repositories on the Hub.
    """
    local = [folder for folder in folders if not is_remote(folder)]
    sources: list[Source] = [
        RemoteSource(folder) if is_remote(folder) else FolderSource(folder, local) for folder in folders
    ]
    return [*sources, HubSource(owners)] if owners else sources


def check_folders(folders: Sequence[str]) -> None:
    """Raises `PrefixServeError` if one of these local folders does not exist."""
    for folder in folders:
        if not is_remote(folder) and not os.path.isdir(os.path.expanduser(folder)):
            raise PrefixServeError(f"--prefix-adapter-dir {folder!r} is not a folder; create it, or correct the path.")


def check_owners(owners: Sequence[str]) -> None:
    """Raises `PrefixServeError` if one of these is neither an owner nor a repository on the Hub."""
    for owner in owners:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", owner, re.ASCII):
            raise PrefixServeError(f"--prefix-adapter-hub expects OWNER or OWNER/NAME, got {owner!r}.")


def _is_below(path: str, roots: Sequence[str]) -> bool:
    return any(path.startswith(root.rstrip("/") + "/") for root in roots)
