"""The adapters of one server, in a private folder that all of its API server processes share.

The registry is a journal. Each change appends a line, and a process reads the lines it has not read yet. The length of
the journal lies in memory that all processes share, so a lookup compares this length and reads a dict: no system call,
whatever the number of adapters. Names are never part of a path.
"""

from __future__ import annotations

import atexit
import dataclasses
import fcntl
import functools
import json
import math
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from peft_prefix_ext.checkpoint.compatibility import StateShape
from vllm_plugin.adapters import pinned_names
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.kv_transfer_config import REGISTRY, settings_in

# `(layer index, num_kv_heads, key_size, value_size)` of each layer.
Shapes = tuple[tuple[int, int, int, int], ...]
StateShapes = tuple[StateShape, ...]
_JOURNAL, _LENGTH, _LAYERS, _STATES = "adapters.jsonl", "length", "layers.json", "states.json"
_NO_LENGTH = bytes(8)


class NameTakenError(ValueError):
    """There is an adapter of that name already."""


@dataclasses.dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter as the front end knows it.

    Args:
        spec: What its requests carry to the engine.
        base_model_name: The served model that `/v1/models` lists as its parent, if the operator named one.
        shapes: The shapes of its layers.
        states: The shapes of its states of recurrent layers; empty if these start from zero.
        chat_template: The chat template of the messages behind it, if it stands for the opening of a chat.
        files: The state that its files had when they were read, for an adapter that a request has found by its name and whose
            files are looked at again; None for one that the operator has named.
    """

    spec: PrefixSpec
    base_model_name: str | None
    shapes: Shapes
    states: StateShapes = ()
    chat_template: str | None = None
    files: str | None = None

    @property
    def is_verified(self) -> bool:
        """Whether its values were read and checked. An engine gets no other adapter."""
        return bool(self.spec.digest)


class _Change(msgspec.Struct):
    """A line of the journal: an adapter that is added or replaced, or None for one that is removed."""

    name: str
    adapter: Adapter | None


_CHANGE = msgspec.json.Decoder(_Change)


class Registry:
    """The adapters of one server.

    Args:
        folder: The registry's folder; see `make_folder`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._journal = (self.folder / _JOURNAL).open("a+b", buffering=0)
        with (self.folder / _LENGTH).open("a+b") as length:
            # Keeps the content of a file that another process has made.
            os.ftruncate(length.fileno(), len(_NO_LENGTH))
            self._length = mmap.mmap(length.fileno(), len(_NO_LENGTH))
        self._lock = threading.Lock()
        self._adapters: dict[str, Adapter] = {}
        # The names of those that are pinned.
        self._pinned: set[str] = set()
        self._shapes: dict[Shapes | StateShapes, Any] = {}
        self._seen, self._seen_length = 0, _NO_LENGTH

    @property
    def is_new(self) -> bool:
        """Whether no adapter was ever added."""
        return os.fstat(self._journal.fileno()).st_size == 0

    @property
    def version(self) -> bytes:
        """A value that changes with each change of the table."""
        self._refresh()
        return self._seen_length

    def get(self, name: str) -> Adapter | None:
        """Returns the adapter of that name; None if there is none."""
        self._refresh()
        return self._adapters.get(name)

    def adapters(self) -> list[Adapter]:
        """Returns all adapters, in the order in which they were added."""
        self._refresh()
        return list(self._adapters.values())

    def add(self, adapters: Iterable[Adapter], *, replace: bool = False) -> None:
        """Adds all of the adapters, or none of them.

        Raises:
            NameTakenError: If one has the name of another adapter, and `replace` is off.
        """
        with self._changing():
            new = {adapter.spec.name: adapter for adapter in adapters}
            if not replace and (taken := new.keys() & self._adapters.keys()):
                raise NameTakenError(min(taken))
            self._append({"name": name, "adapter": adapter} for name, adapter in new.items())

    def exchange(self, old: Adapter | None, new: Adapter | None) -> bool:
        """Puts `new` in the place of `old`, unless someone else has changed what is there. None stands for no adapter.

        Returns:
            Whether it is there now.
        """
        named = old or new
        assert named is not None
        name = named.spec.name
        with self._changing():
            if self._adapters.get(name) != old:
                return False
            self._append([{"name": name, "adapter": new}])
            return True

    def remove(self, name: str) -> None:
        """Removes an adapter. Running requests keep it: they carry all that the engine needs.

        Raises:
            KeyError: If there is none of that name.
        """
        with self._changing():
            if name not in self._adapters:
                raise KeyError(name)
            self._append([{"name": name, "adapter": None}])

    def layers(self) -> Shapes | None:
        """Returns the shapes of the engine's layers with a KV cache.

        None before the engine has started, or if it runs on another machine.
        """
        rows = self._rows(_LAYERS)
        return tuple((row["index"], row["num_kv_heads"], row["key_size"], row["value_size"]) for row in rows) or None

    def block_size(self) -> int | None:
        """Returns the tokens per block of the engine's cache; None where `layers` returns None."""
        sizes = [row["block_size"] for row in self._rows(_LAYERS) if "block_size" in row]
        return math.lcm(*sizes) if sizes else None

    def states(self) -> StateShapes:
        """Returns the shapes of the states of the engine's recurrent layers; none where `layers` returns None."""
        return _state_shapes(self._rows(_STATES))

    def add_layers(self, layers: Shapes, block_size: int, states: StateShapes = ()) -> None:
        """Publishes the layers of a worker: all layers of the model, or those of one pipeline stage.

        Args:
            layers: The shapes of the layers with a KV cache.
            block_size: Tokens per block of their cache.
            states: The shapes of the states of recurrent layers.
        """
        fields = ("index", "num_kv_heads", "key_size", "value_size")
        with self._changing():
            # The states first: whoever finds layers finds their states as well.
            if states:
                self._write(_STATES, sorted({*self.states(), *states}))
            rows = {row["index"]: row for row in self._rows(_LAYERS)}
            for layer in layers:
                rows[layer[0]] = {**dict(zip(fields, layer, strict=True)), "block_size": block_size}
            self._write(_LAYERS, [rows[index] for index in sorted(rows)])

    def _rows(self, file: str) -> list[Any]:
        try:
            rows: list[Any] = json.loads((self.folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        return rows

    def _write(self, file: str, rows: list[Any]) -> None:
        new = self.folder / f"{file}.new"
        new.write_text(json.dumps(rows), encoding="utf-8")
        new.replace(self.folder / file)

    def _refresh(self) -> None:
        if self._length[:] != self._seen_length:
            with self._lock:
                self._read()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Locks the registry against changes by other threads and processes, and brings it up to date."""
        with self._lock:
            fcntl.flock(self._journal, fcntl.LOCK_EX)
            try:
                self._read()
                # Removes an incomplete line, left by a process that died while it wrote.
                os.ftruncate(self._journal.fileno(), self._seen)
                yield
            finally:
                fcntl.flock(self._journal, fcntl.LOCK_UN)

    def _append(self, changes: Iterable[dict[str, Any]]) -> None:
        changes = list(changes)
        pinned = self._pinned.difference(change["name"] for change in changes)
        pinned.update(change["name"] for change in changes if change["adapter"] and change["adapter"].spec.pinned)
        # Before any request can have one of them, and if it fails, nothing has changed.
        if pinned != self._pinned:
            pinned_names.write(self.folder, pinned)
        lines = b"".join(msgspec.json.encode(change) + b"\n" for change in changes)
        written = self._journal.write(lines)
        if written != len(lines):
            os.ftruncate(self._journal.fileno(), self._seen)
            raise OSError(f"The registry of prefix adapters in {self.folder} cannot grow: the disk is full.")
        self._read()
        self._length[:] = self._seen_length

    def _read(self) -> None:
        self._journal.seek(self._seen)
        lines = self._journal.read()
        # Only complete lines: another process may be writing.
        lines = lines[: lines.rfind(b"\n") + 1]
        for line in lines.splitlines():
            change = _CHANGE.decode(line)
            if change.adapter is None:
                del self._adapters[change.name]
                self._pinned.discard(change.name)
            else:
                # Adapters of one model have the same shapes, which are kept once.
                shapes = self._shapes.setdefault(change.adapter.shapes, change.adapter.shapes)
                states = self._shapes.setdefault(change.adapter.states, change.adapter.states)
                self._adapters[change.name] = dataclasses.replace(change.adapter, shapes=shapes, states=states)
                (self._pinned.add if change.adapter.spec.pinned else self._pinned.discard)(change.name)
        self._seen += len(lines)
        self._seen_length = self._seen.to_bytes(len(_NO_LENGTH), "little")


def _state_shapes(rows: Iterable[Iterable[Any]]) -> StateShapes:
    return tuple(StateShape(layer, kind, number, tuple(shape)) for layer, kind, number, shape in rows)


def registry_in(kv_transfer_config: Any) -> Registry | None:
    """Returns the registry of the server with this `KVTransferConfig`; None if it serves no prefixes."""
    settings = settings_in(kv_transfer_config)
    return None if settings is None else registry_at(settings[REGISTRY])


@functools.lru_cache(maxsize=8)
def registry_at(folder: str) -> Registry:
    """Returns this process's view of the registry in `folder`."""
    return Registry(folder)


def make_folder() -> str:
    """Creates the folder of a new registry, private to this user. It is removed when this process exits."""
    folder = tempfile.mkdtemp(prefix="vllm-prefix-adapters-")
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: str, owner: int) -> None:
    # Forks of the process run this as well.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
