"""The README's code does what it says, on a tiny model: trains, serves, asks, and runs offline."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time

import pytest
from readme_code import LOCAL, block, run

from helpers.tiny import tiny_model
from peft_prefix_ext.cli import main

ENGINE = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, subword_tokenizer):
    folder = tmp_path_factory.mktemp("readme")
    tiny_model("llama", vocab_size=300, head_dim=32).save_pretrained(folder / "base")
    subword_tokenizer.save_pretrained(folder / "base")
    run(block("python", "get_peft_model"), folder)
    return folder


def test_training_writes_an_adapter(folder):
    names = {path.name for path in (folder / "restaurant").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names


def test_several_prefixes_in_one_batch(folder):
    run(block("python", "__base__"), folder)


def test_adapters_on_disk(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for line in block("bash", "prefix-ext verify").splitlines():
        command = shlex.split(line)
        assert command[0] == "prefix-ext"
        main(command[1:])
    assert (folder / "both" / "adapter_model.safetensors").exists()


def test_offline(folder):
    settings = "".join(f"{name}={value!r}, " for name, value in ENGINE.items())
    code = block("python", "LLM(model=").replace(f'model="{LOCAL}", ', f'model="{LOCAL}", {settings}')
    assert run(code, folder).strip()


def test_server_and_client(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = shlex.split(block("bash", "vllm serve"))
    assert command[:2] == ["vllm", "serve"]
    options = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--port", str(port)]
    log = (folder / "server.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm_plugin", *command[2:], *options],
        cwd=folder,
        stdout=log,
        stderr=log,
        env={**os.environ, "PREFIX_SERVE_ALLOW_RUNTIME_UPDATING": "1"},
    )
    client = block("python", "OpenAI(").replace(":8000", f":{port}")
    try:
        deadline = time.monotonic() + 500
        while time.monotonic() < deadline and server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        assert run(client, folder).startswith("restaurant ")
        for line in block("bash", "load_prefix_adapter").replace(":8000", f":{port}").splitlines():
            command = [*shlex.split(line), "--fail-with-body", "--silent"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
    finally:
        server.terminate()
        server.wait(60)
