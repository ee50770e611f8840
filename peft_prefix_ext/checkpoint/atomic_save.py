"""Replaces the files of an adapter atomically: a process that is killed while it saves leaves the old adapter or the new one.

One file can be replaced atomically, two cannot. So config and weights are written to a pending folder within the adapter's
folder, and the weights are moved first; from then on the adapter is the new one. A pending folder with a config but no
weights means that this config belongs to the weights.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peft_prefix_ext.checkpoint.format import CONFIG_NAME

# Prefixes of folders that are being written and that are complete; node and process id of the writer follow.
_WRITING, _PENDING = ".adapter-writing-", ".adapter-pending-"


def config_of(folder: Path) -> Path:
    """Returns the path of the config that belongs to the weights in `folder`."""
    config = folder / CONFIG_NAME
    with suppress(OSError):  # the folder may disappear meanwhile
        pending = [folder / name for name in os.listdir(folder) if name.startswith(_PENDING)]
        # Without a config in `folder`, its first adapter is not complete yet.
        for path in pending if pending and config.is_file() else ():
            if (path / CONFIG_NAME).is_file() and not _has_weights(path):
                return path / CONFIG_NAME
    return config


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields an empty folder, whose files replace those of the same names in `folder` at the end of the context.

    `folder` is created if needed. Each folder within it is another adapter. After an error nothing is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _recover(folder)
    new = Path(tempfile.mkdtemp(prefix=f"{_WRITING}{platform.node()}-{os.getpid()}-", dir=folder))
    new.chmod(stat.S_IMODE(folder.stat().st_mode))
    pending = new.name.replace(_WRITING, _PENDING)
    try:
        yield new
        for adapter in sorted(path for path in new.iterdir() if path.is_dir()):
            target = folder / adapter.name
            target.mkdir(exist_ok=True)
            _recover(target)
            _replace(adapter, target, pending)
        _replace(new, folder, pending)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _replace(new: Path, folder: Path, pending: str) -> None:
    """Moves the files of `new` to `folder`, by way of a folder in it called `pending`, and removes `new`."""
    same = [path / CONFIG_NAME for path in (new, folder)]
    if all(path.is_file() for path in same) and same[0].read_bytes() == same[1].read_bytes():
        same[0].unlink()
    complete = new.rename(folder / pending)
    for path in sorted(complete.iterdir(), key=lambda path: (path.name == CONFIG_NAME, _is_weights(path))):
        path.replace(folder / path.name)
    complete.rmdir()


def _recover(folder: Path) -> None:
    """Completes or removes the folders of writers that no longer run."""
    for left in [*folder.glob(f"{_WRITING}*"), *folder.glob(f"{_PENDING}*")]:
        if _is_alive(left):
            continue
        config = left / CONFIG_NAME
        if left.name.startswith(_PENDING) and config.is_file():
            if _has_weights(left):
                config.unlink()  # before the weights: alone, it would belong to the weights in `folder`
            else:
                config.replace(folder / CONFIG_NAME)
        shutil.rmtree(left, ignore_errors=True)


def _is_alive(left: Path) -> bool:
    """Whether the process that writes this folder may still run."""
    node, process, _ = left.name.removeprefix(_WRITING).removeprefix(_PENDING).rsplit("-", 2)
    if node != platform.node() or os.name != "posix":
        return True
    if int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_weights(path: Path) -> bool:
    return path.name.startswith("adapter_model.")


def _has_weights(folder: Path) -> bool:
    return any(_is_weights(path) for path in folder.iterdir())
