"""A server with two prefixes in a process of its own, and requests to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from helpers.serving import support

CONFIG = support.llama_config()
PREFIXES = {"pirate": support.random_prefix(CONFIG, 32, seed=1), "poet": support.random_prefix(CONFIG, 7, seed=2)}
MAX_MODEL_LEN = 256
ENVIRONMENT = {
    **os.environ,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "PREFIX_SERVE_ALLOW_RUNTIME_UPDATING": "1",
}


def command(folder: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm_plugin", str(folder / "model"), "--served-model-name", "base"),
        *("--dtype", "float32", "--enforce-eager", "--block-size", str(support.BLOCK_SIZE)),
        *("--max-model-len", str(MAX_MODEL_LEN), "--host", "127.0.0.1", *options),
    ]


def launch(folder: Path, *options: str, **popen: Any) -> subprocess.Popen[Any]:
    return subprocess.Popen(command(folder, *options), env=ENVIRONMENT, text=True, **popen)


def write_models(folder: Path) -> Path:
    """Saves the base model and its prefixes."""
    support.write_model(folder / "model", CONFIG, tokenizer=True)
    for name, prefix in PREFIXES.items():
        support.write_adapter(folder / name, CONFIG, prefix)
    return folder


@contextmanager
def serve(folder: Path, *options: str, adapters: Mapping[str, Path] | None = None) -> Iterator[openai.OpenAI]:
    """Starts a server with all prefixes, or other adapters, and yields a client of it once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log"
    if adapters is None:
        adapters = {name: folder / name for name in PREFIXES}
    prefixes = ["--prefix-adapter", *(f"{name}={path}" for name, path in adapters.items()), "--prefix-adapter-warmup"]
    with log.open("w") as stream:
        server = launch(
            folder,
            *("--port", str(port), "--enable-prompt-tokens-details"),
            *(prefixes if adapters else []),
            *options,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        try:
            # pytest's timeout ends this loop if the server never answers.
            while not answers(client):
                assert server.poll() is None
                time.sleep(0.5)
        except BaseException:
            print(log.read_text()[-4000:])
            server.kill()
            raise
        try:
            yield client
        finally:
            server.terminate()
            server.wait()


def answers(client: openai.OpenAI) -> bool:
    try:
        client.models.list()
    except openai.APIConnectionError:
        return False
    return True


def complete(client: Any, model: str, prompt: Any, max_tokens: int | None = 6, **options: Any) -> Any:
    extra_body = {"ignore_eos": True, "skip_special_tokens": False, **options.pop("extra_body", {})}
    return client.completions.create(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=extra_body, **options
    )


def load(client: openai.OpenAI, name: str, path: Path | str, **more: Any) -> None:
    client.post("/load_prefix_adapter", body={"prefix_name": name, "prefix_path": str(path), **more}, cast_to=str)


def unload(client: openai.OpenAI, name: str) -> None:
    client.post("/unload_prefix_adapter", body={"prefix_name": name}, cast_to=str)
