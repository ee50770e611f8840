"""Reads a safetensors file: its header alone, or some of its tensors, too.

The library maps the file. A mapping changes with the file, and a process that reads one ends when the file is truncated. Here
the file is read once, and the digest is that of the bytes that were read.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peft_prefix_ext.checkpoint.format import FLOAT_DTYPES
from peft_prefix_ext.checkpoint.regular_file import MAX_WEIGHTS_BYTES, open_regular, read_into

# As in the library.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
# Thousands of adapters of one model have the same header, which is parsed once. Larger headers are rare, and not kept.
MAX_KEPT_BYTES = 1 << 20
# The sizes of a tensor with very many dimensions would take long to multiply.
_MAX_DIMENSIONS = 16
_CHUNK_BYTES = 1 << 20


class SafetensorsError(ValueError):
    """A file is not in the format of safetensors."""


class TensorHeader(NamedTuple):
    """What the header says of one tensor; `start` and `end` are its place behind the header, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile(NamedTuple):
    """What was read of a file.

    Args:
        header: Its header.
        headers: What the header says of each tensor, by name, in the order of the file. Files share it: it must not be changed.
        contents: The bytes of the tensors that were read, by name.
        digest: SHA-256 of the whole file, in hex; empty if only the header was read.
    """

    header: bytes
    headers: dict[str, TensorHeader]
    contents: dict[str, bytearray]
    digest: str

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a float tensor; on the meta device, without values, if it was not read."""
        header = self.headers[name]
        dtype = FLOAT_DTYPES[header.dtype]
        if name not in self.contents:
            return torch.empty(header.shape, dtype=dtype, device="meta")
        # `frombuffer` takes no empty buffer.
        content = self.contents[name] or bytearray(dtype.itemsize)
        return torch.frombuffer(content, dtype=dtype)[: math.prod(header.shape)].view(header.shape)


def read_safetensors(path: Path, choose: Callable[[SafetensorsFile], Container[str]] | None) -> SafetensorsFile:
    """Reads a file.

    Args:
        path: The file.
        choose: Takes what the header says, and returns the names of the tensors whose values are wanted. What it raises, ends
            the reading before any value takes memory. `None` to read the header alone.

    Raises:
        SafetensorsError: If it is malformed, or not as long as its header says.
        OSError: If it cannot be read, or is no regular file.
    """
    with open_regular(path, MAX_WEIGHTS_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        if size < _LENGTH_BYTES:
            raise SafetensorsError("it is too short for a header")
        length = read_into(file, bytearray(_LENGTH_BYTES))
        header_bytes = int.from_bytes(length, "little")
        num_bytes = size - _LENGTH_BYTES - header_bytes
        if num_bytes < 0 or header_bytes > _MAX_HEADER_BYTES:
            raise SafetensorsError(f"a header of {header_bytes} bytes in a file of {size}")
        text = bytes(read_into(file, bytearray(header_bytes)))
        headers = _headers(text)
        end = next(reversed(headers.values())).end if headers else 0
        if end != num_bytes:
            raise SafetensorsError(f"its tensors take {end} bytes, and {num_bytes} are there")
        header_alone = SafetensorsFile(text, headers, {}, "")
        if choose is None:
            return header_alone
        wanted = choose(header_alone)
        digest = hashlib.sha256(length)
        digest.update(text)
        contents: dict[str, bytearray] = {}
        for name, header in headers.items():
            if name in wanted:
                contents[name] = read_into(file, bytearray(header.end - header.start))
                digest.update(contents[name])
            else:
                _skip(file, header.end - header.start, digest)
    return SafetensorsFile(text, headers, contents, digest.hexdigest())


def _skip(file: io.FileIO, num_bytes: int, digest: Any) -> None:
    """Reads bytes for the digest alone."""
    while num_bytes:
        chunk = read_into(file, bytearray(min(num_bytes, _CHUNK_BYTES)))
        digest.update(chunk)
        num_bytes -= len(chunk)


def _headers(text: bytes) -> dict[str, TensorHeader]:
    return _parse_cached(text) if len(text) <= MAX_KEPT_BYTES else _parse(text)


def _parse(text: bytes) -> dict[str, TensorHeader]:
    """Parses a header, and checks that its tensors follow each other without a gap."""
    try:
        fields = json.loads(text.decode(), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"its header is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise SafetensorsError("its header is not a JSON object")
    fields.pop("__metadata__", None)
    found = ((name, _tensor_header(name, field)) for name, field in fields.items())
    headers = dict(sorted(found, key=lambda item: item[1][2:]))
    end = 0
    for header in headers.values():
        if header.start != end:
            raise SafetensorsError(f"its tensors overlap or leave a gap at byte {end}")
        end = header.end
    return headers


_parse_cached = functools.lru_cache(maxsize=16)(_parse)


def _tensor_header(name: str, field: Any) -> TensorHeader:
    try:
        dtype, shape, (start, end) = field["dtype"], field["shape"], field["data_offsets"]
        well_formed = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS
        well_formed = well_formed and all(type(number) is int and number >= 0 for number in (*shape, start, end))
        # The sizes of other types do not matter: none of their tensors is used.
        if well_formed and dtype in FLOAT_DTYPES:
            well_formed = end - start == math.prod(shape) * FLOAT_DTYPES[dtype].itemsize
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed or start > end:
        raise SafetensorsError(f"its header has a malformed tensor {name!r}")
    return TensorHeader(dtype, tuple(shape), start, end)


def _without_doubles(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name!r} is there twice")
        fields[name] = value
    return fields
