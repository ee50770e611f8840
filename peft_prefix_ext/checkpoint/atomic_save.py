"""An adapter's files replaced as one: a process that is killed while it saves leaves the old adapter or the new one.

A file can be replaced at once, two cannot. So both are written to a folder of their own within the adapter's, and then the
weights are moved: from here on the adapter is the new one. A config that is still in that folder, where no weights are
any more, is the one that goes with the weights.
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

# Of files that are being written, and of those that are complete; who writes them is in the rest of the name.
_WRITING, _PENDING = ".adapter-writing-", ".adapter-pending-"


def config_of(folder: Path) -> Path:
    """Returns where the config is that goes with the weights in `folder`; a first adapter is none before it is complete."""
    config = folder / CONFIG_NAME
    with suppress(OSError):  # such as that of a folder which is gone in this moment
        for pending in folder.glob(f"{_PENDING}*") if config.is_file() else ():
            if (pending / CONFIG_NAME).is_file() and not _has_weights(pending):
                return pending / CONFIG_NAME
    return config


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields an empty folder; what is written there replaces, file by file, what is in `folder`, made if need be.

    Each folder within it is an adapter of its own. After an error nothing is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _finish_what_was_killed(folder)
    new = Path(tempfile.mkdtemp(prefix=f"{_WRITING}{platform.node()}-{os.getpid()}-", dir=folder))
    new.chmod(stat.S_IMODE(folder.stat().st_mode))
    pending = new.name.replace(_WRITING, _PENDING)
    try:
        yield new
        for adapter in sorted(path for path in new.iterdir() if path.is_dir()):
            target = folder / adapter.name
            target.mkdir(exist_ok=True)
            _finish_what_was_killed(target)
            _replace(adapter, target, pending)
        _replace(new, folder, pending)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _replace(new: Path, folder: Path, pending: str) -> None:
    """Replaces files in `folder` by those in `new`, which goes; meanwhile it is a folder in there, called `pending`."""
    same = [path / CONFIG_NAME for path in (new, folder)]
    if all(path.is_file() for path in same) and same[0].read_bytes() == same[1].read_bytes():
        same[0].unlink()
    complete = new.rename(folder / pending)
    for path in sorted(complete.iterdir(), key=lambda path: (path.name == CONFIG_NAME, _is_weights(path))):
        path.replace(folder / path.name)
    complete.rmdir()


def _finish_what_was_killed(folder: Path) -> None:
    """Completes or drops what processes left behind that are no more."""
    for left in [*folder.glob(f"{_WRITING}*"), *folder.glob(f"{_PENDING}*")]:
        if _is_alive(left):
            continue
        config = left / CONFIG_NAME
        if left.name.startswith(_PENDING) and config.is_file():
            if _has_weights(left):
                config.unlink()  # first, or else it would go with the weights in `folder`
            else:
                config.replace(folder / CONFIG_NAME)
        shutil.rmtree(left, ignore_errors=True)


def _is_alive(left: Path) -> bool:
    """Whether the process that made this folder may still be at it."""
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
