"""Adapters that workers read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.serving import support
from helpers.serving.worker import CONFIG
from vllm_plugin.adapters.loading import digest_of, load
from vllm_plugin.adapters.spec import PrefixSpec


@pytest.fixture
def adapters(tmp_path: Path) -> Callable[..., tuple[PrefixSpec, support.Prefix]]:
    """Writes an adapter of `p` virtual tokens."""

    def write(name: str, p: int = 6) -> tuple[PrefixSpec, support.Prefix]:
        prefix = support.random_prefix(CONFIG, p, seed=sum(map(ord, name)))
        folder = support.write_adapter(tmp_path / name, CONFIG, prefix)
        return PrefixSpec(name, str(folder), str(folder), p, digest_of(load(name, str(folder)))), prefix

    return write
