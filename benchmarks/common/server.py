"""A server in a process of its own, and clients that stream from it, measured by vLLM's own client."""

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
from benchmarks.common.workload import Job
from benchmarks.serving.offline_engine import summary

BASE = "base"
READY_SECONDS = 1200
# With few cores vLLM computes with all of them if there is a KV connector, and otherwise leaves one to its front end: here no
# server leaves any.
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
# vLLM's own server; the plugin's command is the same with the plugin, whatever VLLM_PLUGINS says.
VLLM, PLUGIN = ("vllm.entrypoints.openai.api_server", "--model"), ("vllm_plugin",)


class Server:
    """An OpenAI-compatible server for the length of a `with` block, which begins when it answers.

    Args:
        command: `VLLM` or `PLUGIN`.
        model: Folder or hub id.
        options: Of the command line.
        environment: Variables of the new process.
        concurrency: How many clients it has at most.
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
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, open as long as the server runs
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

    def run(self, jobs: Sequence[Job], output_tokens: int) -> Measurement:
        """Answers all requests, and returns what was measured.

        Raises:
            RuntimeError: If one was not answered.
        """
        return asyncio.run(self._run(jobs, output_tokens))

    async def _run(self, jobs: Sequence[Job], output_tokens: int) -> Measurement:
        places = asyncio.Semaphore(self._concurrency)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

            async def ask(job: Job) -> Any:
                async with places:
                    return await self._ask(session, job, output_tokens)

            start = time.perf_counter()
            answers = await asyncio.gather(*map(ask, jobs))
            seconds = time.perf_counter() - start
        if failed := [answer.error for answer in answers if not answer.success]:
            raise RuntimeError(f"{len(failed)} of {len(jobs)} requests failed: {failed[0]}")
        return summary(
            seconds,
            sum(answer.output_tokens for answer in answers),
            [answer.ttft for answer in answers],
            [sum(answer.itl) / max(1, output_tokens - 1) for answer in answers],
        )

    async def _ask(self, session: aiohttp.ClientSession, job: Job, output_tokens: int) -> Any:
        from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_completions

        return await async_request_openai_completions(
            RequestFuncInput(
                prompt=job.prompt,
                api_url=f"{self.url}/v1/completions",
                prompt_len=len(job.prompt),
                output_len=output_tokens,
                model=job.adapter or BASE,
                ignore_eos=True,
                extra_body={"temperature": 0},
            ),
            session,
        )


def adapter_options(option: str, adapters: Mapping[str, Path]) -> list[str]:
    """Returns `--prefix-adapter NAME=FOLDER ...`, or `--lora-modules` the same way."""
    return [option, *(f"{name}={path}" for name, path in adapters.items())]
