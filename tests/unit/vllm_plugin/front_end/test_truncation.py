"""Truncation to the context, which includes virtual tokens. `test_openai_endpoints.py` does it on a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi.testclient import TestClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.serving import BaseServing

MESSAGES = [{"role": "user", "content": "w5"}]


def limit(server: TestClient, request: Any) -> int | None:
    """Returns the length that the prompt of a request is truncated to before it is rendered."""
    models = server.app.state.openai_serving_models
    assert asyncio.run(BaseServing(models, models.model_config)._check_model(request)) is None
    cut: int | None = request.build_tok_params(models.model_config).truncate_prompt_tokens
    return cut


# The context is 256, and the prefix has 4 tokens; one is left for the output.
@pytest.mark.parametrize(("name", "room"), [("one", 256 - 4 - 1), ("base", -1)])
def test_truncation_to_the_context(server: TestClient, name: str, room: int) -> None:
    assert limit(server, CompletionRequest(model=name, prompt="w5", truncate_prompt_tokens=-1)) == room
    assert limit(server, ChatCompletionRequest(model=name, messages=MESSAGES, truncate_prompt_tokens=-1)) == room
    for auto in ("auto", None):
        assert limit(server, ResponsesRequest(model=name, input="w5", truncation=auto)) == room


@pytest.mark.parametrize("name", ["one", "base"])
def test_truncation_only_on_request(server: TestClient, name: str) -> None:
    assert limit(server, CompletionRequest(model=name, prompt="w5", truncate_prompt_tokens=7)) == 7
    assert limit(server, ResponsesRequest(model=name, input="w5")) is None
    # Limits forged by a client have no effect.
    forged = {"truncation": "auto", "prefix_prompt_limit": 7}
    assert limit(server, ChatCompletionRequest(model=name, messages=MESSAGES, **forged)) is None
    assert limit(server, ResponsesRequest(model=name, input="w5", truncation="disabled", prefix_prompt_limit=7)) is None
    assert limit(server, ResponsesRequest(model=name, input="w5", truncation="auto", prefix_prompt_limit=7)) != 7
