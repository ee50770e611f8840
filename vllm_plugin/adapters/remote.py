"""Adapters in remote storage (`s3://`, `gs://`, `hf://`, whatever fsspec reads), and their copies in a local cache.

Each state of an adapter has a folder of its own in the cache, which is complete when it gets its name and never changes. The
least recently used folders are removed when the cache is larger than it may be. What an engine has in memory stays there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_prefix_ext.checkpoint.format import CONFIG_NAME, WEIGHTS_NAME, PrefixCheckpointError, PrefixNotFoundError
from peft_prefix_ext.checkpoint.hub import reason_of
from peft_prefix_ext.checkpoint.regular_file import MAX_CONFIG_BYTES
from vllm_plugin.adapters.digest_cache import cache_folder

DEFAULT_CACHE_SIZE = 10 << 30
_CHUNK_BYTES = 8 << 20
_ABANDONED_SECONDS = 24 * 3600
_FOLDER, _LOCK = "remote", "lock"
# How often a download is begun again because the files were replaced meanwhile.
_MAX_ATTEMPTS = 3
# What a file's properties may say of its state beside fsspec's own key, which for HTTP is that of the address.
_STATE_FIELDS = ("size", "ETag", "Content-MD5", "Digest", "Last-Modified")


def is_remote(source: str) -> bool:
    """Returns whether a source is an address that fsspec reads, and not a path or a repository."""
    return "://" in source


class RemoteCache:
    """Local copies of remote adapters.

    Args:
        folder: Where they lie.
        capacity: Their size in bytes, all together.
    """

    def __init__(self, folder: Path, capacity: int = DEFAULT_CACHE_SIZE) -> None:
        self.folder, self.capacity = folder, capacity

    def fetch(self, url: str) -> Path:
        """Returns the folder of an adapter in its present state, and downloads it if it is not there.

        Raises:
            PrefixNotFoundError: If there is none.
            PrefixCheckpointError: If it is larger than the cache.
        """
        with _told(url):
            files, path = filesystem(url)
            for _ in range(_MAX_ATTEMPTS):
                copy = self._fetch(url, files, path)
                if copy is not None:
                    break
            else:
                raise OSError("it is replaced again and again while it is downloaded")
        # By the time of this change, the least recently used copies are found.
        with contextlib.suppress(OSError):
            os.utime(copy)
        return copy

    def _fetch(self, url: str, files: Any, path: str) -> Path | None:
        """Returns the copy of an adapter in its present state; None if that changes while it is downloaded."""
        state, size = _state(files, path)
        if state is None:
            raise FileNotFoundError(f"no {CONFIG_NAME} and {WEIGHTS_NAME} there")
        if size > self.capacity:
            raise PrefixCheckpointError(
                f"The adapter in {url} has {size} bytes, more than --prefix-adapter-cache-size allows; raise it."
            )
        copy = self.folder / _hash(url.rstrip("/")) / _hash(state)
        return copy if copy.is_dir() or self._download(files, path, state, copy) else None

    def _download(self, files: Any, path: str, state: str, copy: Path) -> bool:
        """Downloads an adapter to `copy`. Returns whether it is in this state before and afterwards, and so of one piece."""
        copy.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
        try:
            _copy(files, f"{path}/{CONFIG_NAME}", new / CONFIG_NAME, MAX_CONFIG_BYTES)
            _copy(files, f"{path}/{WEIGHTS_NAME}", new / WEIGHTS_NAME, self.capacity)
            if _state(files, path)[0] != state:
                return False
            with self._locked():
                # Unless another process was faster.
                if not copy.is_dir():
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    new.rename(copy)
                self._make_room(copy)
            return True
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _make_room(self, keep: Path) -> None:
        """Removes the least recently used copies until all fit, and what downloads of processes that ended have left."""
        for left in self.folder.glob(".new-*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        copies = [copy for copy in self.folder.glob("*/*") if copy.is_dir() and not copy.parent.name.startswith(".")]
        used = {copy: (copy.stat().st_mtime_ns, sum(file.stat().st_size for file in copy.iterdir())) for copy in copies}
        total = sum(size for _, size in used.values())
        for copy in sorted(copies, key=lambda copy: used[copy]):
            if total <= self.capacity:
                break
            if copy != keep:
                shutil.rmtree(copy, ignore_errors=True)
                with contextlib.suppress(OSError):
                    copy.parent.rmdir()
                total -= used[copy][1]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / _LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


_capacity = DEFAULT_CACHE_SIZE


def use_cache(capacity: int | None) -> None:
    """Sets the size of the cache for this process, in bytes; None for the default."""
    global _capacity
    _capacity = DEFAULT_CACHE_SIZE if capacity is None else capacity


def fetch(url: str) -> Path:
    """Returns the local copy of a remote adapter in its present state; see `RemoteCache.fetch`."""
    return RemoteCache(cache_folder() / _FOLDER, _capacity).fetch(url)


def remote_state(url: str) -> str | None:
    """Returns a text that changes with an adapter's files; None if one of them is missing.

    Raises:
        PrefixNotFoundError: If the storage cannot be asked.
    """
    with _told(url):
        state, _ = _state(*filesystem(url))
        return state


def filesystem(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system of an address, and the path in it, without a slash at its end."""
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    return files, path.rstrip("/")


def _state(files: Any, path: str) -> tuple[str | None, int]:
    # Listings may be cached, and would hide a change.
    files.invalidate_cache()
    keys, size = [], 0
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            info = files.info(f"{path}/{name}")
        except FileNotFoundError:
            return None, 0
        # A hash of the file's properties, such as its ETag.
        keys.append(str(files.ukey(f"{path}/{name}")))
        keys += [str(info[field]) for field in _STATE_FIELDS if field in info]
        size += info.get("size") or 0
    return " ".join(keys), size


def _copy(files: Any, path: str, target: Path, max_bytes: int) -> None:
    """Downloads a file, of at most `max_bytes`: a size that was told need not be true."""
    with files.open(path, "rb") as source, target.open("wb") as file:
        done = 0
        while chunk := source.read(_CHUNK_BYTES):
            done += len(chunk)
            if done > max_bytes:
                raise OSError(f"{path} has more than {max_bytes} bytes")
            file.write(chunk)


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Turns the errors of any storage into one sentence."""
    try:
        yield
    except PrefixCheckpointError:
        raise
    except Exception as error:
        # Each file system raises errors of its own, and needs packages of its own, whose names its error says.
        raise PrefixNotFoundError(f"No prefix adapter at {url!r} ({reason_of(error)}).") from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
