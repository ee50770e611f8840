"""A server in its own process, and concurrent clients: vLLM's benchmark client, which streams and measures."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from benchmarks.common.interleaving import Measurement
from benchmarks.common.latency import summarize
from benchmarks.common.workload import PromptRequest

BASE = "base"
READY_SECONDS = 1200
# With few cores, vLLM reserves one for its front end unless there is a KV connector. Here, no server reserves any.
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
# vLLM's own server, and the plugin's command, which loads the plugin whatever VLLM_PLUGINS says.
VLLM, PLUGIN = ("vllm.entrypoints.openai.api_server", "--model"), ("vllm_plugin",)


class Server:
    """An OpenAI-compatible server; a context manager that enters when the server is ready and terminates it at the end.

    Args:
        command: `VLLM` or `PLUGIN`.
        model: Folder or hub id.
        options: Command-line options.
        environment: Variables added to the environment of the process.
        concurrency: The maximum number of concurrent requests.
    """

    def __init__(
        self,
        command: Sequence[str],
        model: str,
        options: Sequence[str],
        environment: Mapping[str, str] | None = None,
        concurrency: int = 8,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._concurrency = concurrency
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, open while the server runs
        address = ("--host", "127.0.0.1", "--port", str(self._port))
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, model, "--served-model-name", BASE, *address, *options],
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Server:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/v1/models").close()
                return self
            except urllib.error.URLError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self._log.seek(0)
                    self.__exit__(None, None, None)
                    raise RuntimeError(f"The server did not start: {self._log.read()[-4000:]}") from None
            time.sleep(0.2)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def run(self, requests: Sequence[PromptRequest], output_tokens: int) -> Measurement:
        """Sends all requests and returns throughput and latency.

        Raises:
            RuntimeError: If a request fails.
        """
        return asyncio.run(self._run(requests, output_tokens))

    async def _run(self, requests: Sequence[PromptRequest], output_tokens: int) -> Measurement:
        slots = asyncio.Semaphore(self._concurrency)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

            async def send(request: PromptRequest) -> Any:
                async with slots:
                    return await self._send(session, request, output_tokens)

            start = time.perf_counter()
            answers = await asyncio.gather(*map(send, requests))
            seconds = time.perf_counter() - start
        if failed := [answer.error for answer in answers if not answer.success]:
            raise RuntimeError(f"{len(failed)} of {len(requests)} requests failed: {failed[0]}")
        return summarize(
            seconds,
            sum(answer.output_tokens for answer in answers),
            [answer.ttft for answer in answers],
            [sum(answer.itl) / max(1, output_tokens - 1) for answer in answers],
        )

    async def _send(self, session: aiohttp.ClientSession, request: PromptRequest, output_tokens: int) -> Any:
        from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_completions

        return await async_request_openai_completions(
            RequestFuncInput(
                prompt=request.prompt,
                api_url=f"{self.url}/v1/completions",
                prompt_len=len(request.prompt),
                output_len=output_tokens,
                model=request.adapter or BASE,
                ignore_eos=True,
                extra_body={"temperature": 0},
            ),
            session,
        )


def adapter_options(option: str, adapters: Mapping[str, Path]) -> list[str]:
    """Returns the arguments `OPTION NAME=FOLDER ...`, for `--prefix-adapter` and `--lora-modules`."""
    return [option, *(f"{name}={path}" for name, path in adapters.items())]
