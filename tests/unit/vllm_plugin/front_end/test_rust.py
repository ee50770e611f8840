"""What vLLM's Rust front end gets of the command line of a server with prefixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.serve.utils.api_utils import jsonify_non_default_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from helpers.serving import app, support
from vllm_plugin.errors import PrefixServeError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("one", "two")):
        app.adapter(tmp_path / name, seed)
    app.adapter(tmp_path / "lora", 3, peft_type="LORA")
    return tmp_path


@pytest.fixture
def rust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")


def parse(model: Path, *options: str, command: str = "serve") -> Any:
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["--model", str(model), "--skip-tokenizer-init", "--max-model-len", "256", *options]
    )
    parsed.subparser = command
    return parsed


def test_it_gets_prefixes_as_lora_modules(model: Path, folder: Path, rust: None) -> None:
    one = {"name": "one", "path": str(folder / "one"), "base_model_name": "base", "pinned": True}
    options = parse(
        model,
        *("--lora-modules", f"two={folder / 'two'}", f"lora={folder / 'lora'}", "--served-model-name", "base"),
        *("--prefix-adapter", json.dumps(one), "--prefix-adapter-pinned", "two", "--enable-prefix-adapters"),
        *("--prefix-adapter-device-memory", "1", "--prefix-adapter-cache-size", "1"),
    )
    config = AsyncEngineArgs.from_cli_args(options).create_engine_config()
    # The engine knows all about them.
    specs = support.specs_in(config.kv_transfer_config)
    assert {name: spec.pinned for name, spec in specs.items()} == {"one": True, "two": True}
    sent = jsonify_non_default_args(options)
    assert not [name for name in vars(options) if name == "prefix_registry"]
    assert not [name for name in sent if "prefix_adapter" in name]
    more = {"is_3d_lora_weight": False}
    assert sent["lora_modules"] == [
        {"name": "lora", "path": str(folder / "lora"), "base_model_name": None, **more},
        {"name": "one", "path": str(folder / "one"), "base_model_name": "base", **more},
        {"name": "two", "path": str(folder / "two"), "base_model_name": None, **more},
    ]


def test_it_gets_nothing_of_a_server_without_names(model: Path, rust: None) -> None:
    options = parse(model, "--enable-prefix-adapters")
    assert AsyncEngineArgs.from_cli_args(options).kv_transfer_config is not None
    assert options.lora_modules is None
    assert not [name for name in jsonify_non_default_args(options) if "prefix" in name]


@pytest.mark.parametrize("option", ["dir", "hub", "warmup"])
def test_what_needs_python_is_refused(model: Path, folder: Path, rust: None, option: str) -> None:
    value = {"dir": [str(folder)], "hub": ["me"], "warmup": []}[option]
    options = parse(model, "--prefix-adapter", f"one={folder / 'one'}", f"--prefix-adapter-{option}", *value)
    message = (
        rf"\A--prefix-adapter-{option} needs vLLM's Python front end; unset VLLM_USE_RUST_FRONTEND, or leave it out.\Z"
    )
    with pytest.raises(PrefixServeError, match=message):
        AsyncEngineArgs.from_cli_args(options)


@pytest.mark.parametrize("options", [{"command": "run-batch"}, {"headless": True}])
def test_what_runs_in_python_keeps_its_options(model: Path, folder: Path, rust: None, options: dict[str, Any]) -> None:
    """Whatever the variable says: other commands, and engines without a front end."""
    parsed = parse(
        model,
        *("--prefix-adapter", f"one={folder / 'one'}", "--prefix-adapter-warmup"),
        *(["--headless"] if options.pop("headless", False) else []),
        **options,
    )
    assert AsyncEngineArgs.from_cli_args(parsed).kv_transfer_config is not None
    assert (parsed.lora_modules, parsed.prefix_adapter_warmup) == (None, [])
    assert parsed.prefix_registry
