"""An engine in a process of its own, and what vLLM's Rust front end sends to it.

The program is part of vLLM's CUDA wheels only. What it sent to an engine with two prefixes is recorded; here it is sent
again, byte for byte but for the prompt, the adapter and the sampling parameters.
"""

from __future__ import annotations

import copy
import json
import uuid
from pathlib import Path
from typing import Any

from vllm.v1.engine import EngineCoreRequestType, FinishReason
from vllm.v1.engine.core_client import SyncMPClient
from vllm.v1.executor import Executor

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "rust_front_end.json").read_text(encoding="utf-8"))
# Where they stand in a request.
_ID, _PROMPT, _PARAMS, _ADAPTER, _SALT, _CLIENTS_ID = 0, 1, 3, 6, 7, 16


class Answer:
    """What the engine sent back of one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.prefill: Any = None
        self.prompt_logprobs: Any = None

    def add(self, output: Any) -> None:
        self.token_ids += output.new_token_ids
        self.finish_reason = output.finish_reason
        self.prefill = output.prefill_stats or self.prefill
        self.prompt_logprobs = output.new_prompt_logprobs_tensors or self.prompt_logprobs


class RustFrontEnd:
    """Starts an engine process, and talks to it as the Rust front end does.

    Args:
        vllm_config: The engine's config.
    """

    def __init__(self, vllm_config: Any) -> None:
        front_end = self

        class Client(SyncMPClient):
            def _apply_ready_response(self, payload: bytes) -> None:
                front_end.ready = payload
                super()._apply_ready_response(payload)

        self.ready = b""
        self.client = Client(vllm_config, Executor.get_class(vllm_config), log_stats=True)
        self._numbers: dict[str, int] = {}

    def load(self, name: str, path: Any, *, load_inplace: bool = False) -> list[Any]:
        """Loads an adapter, and returns what its requests send of it."""
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        adapter = [name, number, str(path), RECORDED["add_lora"][3], load_inplace, RECORDED["add_lora"][5]]
        assert self.client.call_utility("add_lora", adapter) is True
        return adapter

    def unload(self, adapter: list[Any]) -> bool:
        return bool(self.client.call_utility("remove_lora", adapter[1]))

    def ask(self, adapter: list[Any] | None, prompt: list[int], *, salt: str | None = None, **params: Any) -> Answer:
        """Sends a request, and waits for its answer."""
        (answer,) = self.ask_all([self.request(adapter, prompt, salt=salt, **params)])
        return answer

    def ask_all(self, requests: list[list[Any]]) -> list[Answer]:
        """Sends requests at once, and waits for all answers."""
        answers = {request[_ID]: Answer() for request in requests}
        for request in requests:
            self.client._send_input(EngineCoreRequestType.ADD, request)
        while any(answer.finish_reason is None for answer in answers.values()):
            for output in self.client.get_output().outputs:
                answers[output.request_id].add(output)
        return list(answers.values())

    @staticmethod
    def request(adapter: list[Any] | None, prompt: list[int], *, salt: str | None = None, **params: Any) -> list[Any]:
        request = copy.deepcopy(RECORDED["request"])
        request[_CLIENTS_ID] = f"cmpl-{uuid.uuid4().hex[:8]}"
        request[_ID] = f"{request[_CLIENTS_ID]}-{uuid.uuid4().hex[:8]}"
        request[_PROMPT], request[_ADAPTER], request[_SALT] = prompt, adapter, salt
        request[_PARAMS] |= params
        return request
