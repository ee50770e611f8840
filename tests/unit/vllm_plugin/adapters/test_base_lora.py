"""The LoRA adapter below a prefix is identified by its present content."""

from __future__ import annotations

import hashlib
import resource
from pathlib import Path

import pytest

from vllm_plugin.adapters import base_lora, file_state
from vllm_plugin.adapters.file_state import FileState


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_change_that_the_clock_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(b"1")
    state = file_state.state_of(path)
    assert isinstance(state, FileState)
    monkeypatch.setattr(base_lora, "state_of", lambda path: state)
    assert base_lora._digest(path) == sha256(b"1")
    path.write_bytes(b"2")
    assert base_lora._digest(path) == sha256(b"2")


def test_a_file_that_cannot_be_read_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_state, "SETTLING_NS", 0)
    path = tmp_path / "adapter_model.safetensors"
    assert base_lora._digest(path) is None
    path.write_bytes(b"1")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert base_lora._digest(path) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert base_lora._digest(path) == sha256(b"1")
