"""Configs of engines with prefixes, and what refuses to make one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_plugin import prefix_adapters
from vllm_plugin.errors import PrefixServeError


def engine_config(model: Path, sources: Any, **settings: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    if isinstance(sources, (str, Path)):
        sources = {"one": str(sources)}
    if isinstance(sources, dict):
        settings |= prefix_adapters(sources, settings.pop("kv_transfer_config", None))
    return EngineArgs(
        **{"model": str(model), "skip_tokenizer_init": True, "max_model_len": 256, "dtype": "float32", **settings}
    ).create_engine_config()


def refused(model: Path, sources: Any, message: str, **settings: Any) -> None:
    with pytest.raises(PrefixServeError, match=r"\A[^\n]*\Z") as caught:
        engine_config(model, sources, **settings)
    assert message in str(caught.value)
