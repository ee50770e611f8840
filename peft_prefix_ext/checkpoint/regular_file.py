"""Opens files that may not be files: a FIFO, a device or a socket in the place of one must not hold up the reader."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

# An `adapter_config.json` lists every layer, in some hundred bytes each. The weights of a prefix are a small part of its model's.
MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES = 64 << 20, 64 << 30


def open_regular(path: str | Path, max_bytes: int) -> io.FileIO:
    """Opens a regular file for reading, unbuffered.

    Args:
        path: The file, or a link to it.
        max_bytes: The largest size that is read.

    Raises:
        OSError: If it is no regular file, or larger.
    """
    # Otherwise, opening a FIFO waits for a writer. Not every system has both flags.
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is no regular file")
        if found.st_size > max_bytes:
            raise OSError(f"{path} has {found.st_size} bytes, more than {max_bytes}")
        return io.FileIO(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, max_bytes: int) -> bytearray:
    """Reads a regular file, as long as it is when it is opened: one that grows without end does not fill the memory.

    Raises:
        OSError: If it is no regular file, larger than `max_bytes`, or becomes shorter meanwhile.
    """
    with open_regular(path, max_bytes) as file:
        return read_into(file, bytearray(os.fstat(file.fileno()).st_size))


def read_into(file: io.FileIO, content: bytearray) -> bytearray:
    """Fills `content` from a file, and returns it.

    Raises:
        OSError: If fewer bytes are left.
    """
    view, done = memoryview(content), 0
    while done < len(content):
        count = file.readinto(view[done:])
        if not count:
            raise OSError("it became shorter while it was read")
        done += count
    return content
