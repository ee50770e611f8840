"""The patches are attached once, only in processes that serve prefixes, and only to a vLLM that they fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_plugin.errors import PrefixServeError
from vllm_plugin.patches import install, patch


def test_without_adapters_nothing_changes(model: Path, adapter: Path) -> None:
    code = """
import sys
import wrapt
from vllm.config import KVEventsConfig
from vllm.engine.arg_utils import EngineArgs
from vllm_plugin import prefix_adapters, register
from vllm_plugin.patches.patch import vllm_version
from vllm_plugin.patches.engine import ENGINE_PATCHES
from vllm_plugin.patches.engine_core import ENGINE_CORE_PATCHES
from vllm_plugin.patches.kv_events import KV_EVENT_PATCHES
from vllm_plugin.patches.requests import REQUEST_PATCHES
from vllm_plugin.patches.server import SERVER_PATCHES

def needed(*patches):
    return [patch for patch in patches if patch.is_for(vllm_version())]

def wrapped():
    patches = needed(*REQUEST_PATCHES, *ENGINE_PATCHES, *ENGINE_CORE_PATCHES, *KV_EVENT_PATCHES, *SERVER_PATCHES)
    return [patch.method for patch in patches if isinstance(resolve(patch), wrapt.FunctionWrapper)]

def resolve(patch):
    path, attribute, original = wrapt.resolve_path(patch.module, patch.method)
    return original

register()
args = {"model": sys.argv[1], "skip_tokenizer_init": True, "max_model_len": 256}
without = EngineArgs(**args).create_engine_config().kv_transfer_config, wrapped()
served = {**args, **prefix_adapters(one=sys.argv[2])}
found = [without]
for events, patches in ((False, ()), (True, KV_EVENT_PATCHES)):
    events_config = KVEventsConfig(enable_kv_cache_events=events, publisher="null")
    EngineArgs(**served, kv_events_config=events_config).create_engine_config()
    found.append(wrapped() == [patch.method for patch in needed(*REQUEST_PATCHES, *ENGINE_PATCHES, *ENGINE_CORE_PATCHES, *patches)])
print(*found)
"""
    command = [sys.executable, "-c", code, str(model), str(adapter)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "(None, []) True True"


@pytest.mark.parametrize(
    "change", [lambda m: m.setattr("vllm.__version__", "0.99.0"), lambda m: m.setitem(patch.problems, "x", "gone")]
)
def test_an_unknown_vllm_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    monkeypatch.setattr(patch, "problems", {})
    change(monkeypatch)
    with pytest.raises(PrefixServeError, match="Prefix adapters do not work with vLLM"):
        install.require(server=False)


def test_an_operator_can_skip_the_version_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    monkeypatch.setenv(install.ANY_VERSION, "1")
    install.require(server=True)


def test_a_changed_method_is_noticed() -> None:
    import types

    class EngineArgs:
        @staticmethod
        def add_cli_args(other: Any) -> None: ...

    module = types.SimpleNamespace(EngineArgs=EngineArgs)
    first, second = install.START_PATCHES[:2]
    assert first.problem(module) == "EngineArgs.add_cli_args has no parameter parser"
    assert "has no EngineArgs.from_cli_args" in str(second.problem(module))


def test_a_patch_of_workers_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes would import what takes seconds, only to check it."""
    modules = {each.module for each in install.START_PATCHES if each.in_workers}
    assert modules
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)
    install.require(server=True)
    assert modules.isdisjoint(sys.modules)


def test_patches_are_attached_once() -> None:
    from vllm.engine.arg_utils import EngineArgs

    import vllm_plugin

    before = EngineArgs.__dict__["create_engine_config"]
    vllm_plugin.register()
    install.install()
    assert EngineArgs.__dict__["create_engine_config"] is before
