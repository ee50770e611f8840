"""Tests that need an NVIDIA GPU: `pytest -m gpu`. Without one they skip and say so."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
