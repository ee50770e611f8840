"""How the plugin is attached to vLLM: once, only where prefixes are served, and only to what it was written for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_plugin.errors import PrefixServeError
from vllm_plugin.patches import install


def test_without_adapters_nothing_changes(model: Path, adapter: Path) -> None:
    code = """
import sys
import wrapt
from vllm.engine.arg_utils import EngineArgs
from vllm_plugin import prefix_adapters, register
from vllm_plugin.patches.requests import ENGINE_PATCHES, SERVER_PATCHES

def wrapped():
    return [seam.method for seam in (*ENGINE_PATCHES, *SERVER_PATCHES) if isinstance(resolve(seam), wrapt.FunctionWrapper)]

def resolve(seam):
    path, attribute, original = wrapt.resolve_path(seam.module, seam.method)
    return original

register()
args = {"model": sys.argv[1], "skip_tokenizer_init": True, "max_model_len": 256}
without = EngineArgs(**args).create_engine_config().kv_transfer_config, wrapped()
EngineArgs(**args, **prefix_adapters(one=sys.argv[2])).create_engine_config()
print(without, wrapped() == [seam.method for seam in ENGINE_PATCHES])
"""
    command = [sys.executable, "-c", code, str(model), str(adapter)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "(None, []) True"


def test_the_rust_front_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(PrefixServeError, match="unset VLLM_USE_RUST_FRONTEND"):
        install.require(server=True)


@pytest.mark.parametrize(
    "change", [lambda m: m.setattr("vllm.__version__", "0.99.0"), lambda m: m.setitem(install._problems, "x", "gone")]
)
def test_an_unknown_vllm_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    monkeypatch.setattr(install, "_problems", {})
    change(monkeypatch)
    with pytest.raises(PrefixServeError, match="Prefix adapters do not work with vLLM"):
        install.require(server=False)


def test_an_operator_may_have_the_shapes_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    monkeypatch.setenv(install.ANY_VERSION, "1")
    install.require(server=True)


def test_a_changed_method_is_noticed() -> None:
    import types

    class EngineArgs:
        @staticmethod
        def add_cli_args(other: Any) -> None: ...

    module = types.SimpleNamespace(EngineArgs=EngineArgs)
    seam, other = install.START_PATCHES[:2]
    assert seam.problem(module) == "EngineArgs.add_cli_args has no parameter parser"
    assert "has no EngineArgs.from_cli_args" in str(other.problem(module))


def test_wraps_are_put_on_once() -> None:
    from vllm.engine.arg_utils import EngineArgs

    import vllm_plugin

    before = EngineArgs.__dict__["create_engine_config"]
    vllm_plugin.register()
    install.install()
    assert EngineArgs.__dict__["create_engine_config"] is before
