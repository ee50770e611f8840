"""Files are read as the library reads them, and nothing that is not one is read at all."""

from __future__ import annotations

import hashlib
import json
import os
import socket

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from peft_prefix_ext.checkpoint import regular_file
from peft_prefix_ext.checkpoint.format import FLOAT_DTYPES
from peft_prefix_ext.checkpoint.safetensors_file import SafetensorsError, read_safetensors

TENSORS = {
    "b.value": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.key": torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "half": torch.tensor([1.5, -2.5], dtype=torch.float16),
    "number": torch.tensor(7.0, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "other": torch.arange(3),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "file", metadata={"format": "pt"})
    return tmp_path / "file"


def all_of(header):
    return header.headers.keys()


def test_the_tensors_are_those_of_the_library(path):
    read = read_safetensors(path, lambda header: header.headers.keys() - {"half"})
    assert read.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.headers.keys() == TENSORS.keys()
    with safe_open(path, framework="pt") as library:
        for name in TENSORS.keys() - {"half", "other"}:
            tensor = read.tensor(name)
            assert tensor.dtype == library.get_tensor(name).dtype
            assert torch.equal(tensor, library.get_tensor(name))
    assert read.tensor("half").is_meta
    path.write_bytes(b"")
    assert torch.equal(read.tensor("b.value"), TENSORS["b.value"])


def test_the_header_alone(path):
    read = read_safetensors(path, None)
    assert (read.digest, read.contents) == ("", {})
    for name in TENSORS.keys() - {"other"}:
        assert read.tensor(name).is_meta
        assert (read.tensor(name).shape, read.tensor(name).dtype) == (TENSORS[name].shape, TENSORS[name].dtype)


@settings(max_examples=300)
@given(data=st.data(), values=st.booleans())
def test_a_damaged_file_is_refused_where_the_library_refuses_it(path, data, values):
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = path.with_name("damaged")
    damaged.write_bytes(raw[: data.draw(st.integers(len(raw) - 3, len(raw) + 1))])
    try:
        read = read_safetensors(damaged, all_of if values else None)
    except SafetensorsError:
        return
    # The library knows all types by name. Those that are not read may have any name here.
    if {header.dtype for header in read.headers.values()} <= {*FLOAT_DTYPES, "I64"}:
        with safe_open(damaged, framework="pt") as library:
            assert set(library.keys()) == read.headers.keys()
            for name, header in read.headers.items():
                assert list(header.shape) == library.get_slice(name).get_shape()


def write(path, fields, data=b""):
    header = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    ("fields", "data", "message"),
    [
        (b"{", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b"\xff", b"", "not JSON"),
        ([], b"", "not a JSON object"),
        (b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": 1}', b"1234", "is there twice"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, b"12345678", "malformed tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234", "malformed tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234", "malformed tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234", "malformed tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [1] * 17, "data_offsets": [0, 4]}}, b"1234", "malformed tensor 'a'"),
        ({"a": {"dtype": "I8", "shape": [4], "data_offsets": [4, 0]}}, b"1234", "malformed tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678", "leave a gap at byte 0"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678", "4 bytes, and 8 are there"),
        ({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}, b"1", "bytes, and 1 are there"),
    ],
)
def test_a_malformed_header_is_named(tmp_path, fields, data, message):
    write(tmp_path / "file", fields, data)
    for choose in (None, all_of):
        with pytest.raises(SafetensorsError, match=message):
            read_safetensors(tmp_path / "file", choose)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        (tmp_path / "device").symlink_to("/dev/zero")
        for name in ("fifo", "socket", "device", "", "nothing"):
            with pytest.raises(OSError, match=r"no regular file|No such|No such device"):
                read_safetensors(tmp_path / name, None)


def test_a_file_without_end_is_not_read(tmp_path, monkeypatch):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(regular_file.MAX_WEIGHTS_BYTES + 1)
    with pytest.raises(OSError, match="more than"):
        read_safetensors(tmp_path / "sparse", all_of)
    assert regular_file.read_regular("/proc/self/status", 100) == b""


def test_a_file_that_becomes_shorter_while_it_is_read(path, monkeypatch):
    original = regular_file.os.fstat

    def longer(descriptor):
        found = list(original(descriptor))
        found[6] += 4  # its size
        return os.stat_result(found)

    monkeypatch.setattr(regular_file.os, "fstat", longer)
    with pytest.raises(OSError, match="became shorter"):
        regular_file.read_regular(path, 1 << 20)
