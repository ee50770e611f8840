"""What was computed from the values of weights files, kept on disk: a restarted server does not read them again.

An entry belongs to one state of one file (path, inode, size, times), so a file that was overwritten has none. The cache only
saves time: without it, or with a damaged one, files are read again.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vllm_plugin.adapters.file_state import FileState
from vllm_plugin.logger import logger

FOLDER_VARIABLE = "PREFIX_SERVE_CACHE"
# The file is written anew, with the latest half of its entries, when it has more bytes.
MAX_BYTES = 32 << 20


class ValueFacts(NamedTuple):
    """What the values of a prefix say: the digest of its file, and the largest absolute value."""

    digest: str
    largest: float


class DigestCache:
    """The facts of weights files.

    Args:
        path: The cache's file, of JSON lines, each behind its checksum.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._facts: dict[str, ValueFacts] | None = None

    def get(self, path: str | Path, state: FileState | None) -> ValueFacts | None:
        """Returns the facts of a file in this state; None if they are not known."""
        if state is None:
            return None
        with self._lock:
            if self._facts is None:
                self._facts = self._read()
            return self._facts.get(_key(path, state))

    def put(self, path: str | Path, state: FileState | None, facts: ValueFacts) -> None:
        """Adds the facts of a file in this state."""
        if state is None or self.get(path, state) == facts:
            return
        with self._lock:
            assert self._facts is not None
            self._facts[_key(path, state)] = facts
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                if self._path.exists() and self._path.stat().st_size > MAX_BYTES:
                    self._shrink()
                # One write of a line: those of several processes do not mix.
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600)
                try:
                    os.write(descriptor, _line(_key(path, state), facts))
                finally:
                    os.close(descriptor)
            except OSError as error:
                logger.debug("The cache of digests in %s cannot be written: %s.", self._path, error)

    def _read(self) -> dict[str, ValueFacts]:
        facts: dict[str, ValueFacts] = {}
        try:
            lines: Iterable[bytes] = self._path.read_bytes().splitlines() if self._path.is_file() else ()
        except OSError:
            return facts
        for line in lines:
            checksum, _, text = line.partition(b" ")
            # Also the rest of a line that was not written to its end.
            if checksum != _checksum(text):
                continue
            key, digest, largest = json.loads(text)
            facts[key] = ValueFacts(digest, largest)
        return facts

    def _shrink(self) -> None:
        facts = self._facts = self._read()
        for key in list(facts)[: len(facts) // 2]:
            del facts[key]
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        new.write_bytes(b"".join(_line(key, each) for key, each in facts.items()))
        new.chmod(0o600)
        new.replace(self._path)


def _key(path: str | Path, state: FileState) -> str:
    return f"{path} {':'.join(map(str, state))}"


def _line(key: str, facts: ValueFacts) -> bytes:
    text = json.dumps([key, *facts]).encode()
    return b"%s %s\n" % (_checksum(text), text)


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def cache_folder() -> Path:
    """Returns the folder of what this package keeps on disk: by default, one within the Hub's cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get(FOLDER_VARIABLE) or os.path.join(HF_HOME, "peft-prefix-ext"))


def digest_cache() -> DigestCache:
    """Returns the cache of this process."""
    return _digest_cache(os.environ.get(FOLDER_VARIABLE))


@functools.lru_cache(maxsize=4)
def _digest_cache(folder: str | None) -> DigestCache:
    return DigestCache(cache_folder() / "digests.jsonl")
