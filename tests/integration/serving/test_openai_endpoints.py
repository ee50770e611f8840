"""Streaming, truncation and the other endpoints with prefixes, compared token by token with the reference."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from helpers.serving.oracle import EOS, MODELS, PROMPT, Oracle, forbidden, post
from helpers.serving.server import MAX_MODEL_LEN, PREFIXES, complete
from helpers.serving.support import prompt_ids, text_of


@pytest.mark.parametrize("model", MODELS)
def test_streamed_text_equals_the_whole_answer(client: Any, oracle: Oracle, model: str) -> None:
    chunks = list(
        complete(
            client, model, PROMPT, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
        )
    )
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text.split() == text_of(oracle.greedy(model, PROMPT)).split()
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {len(PROMPT)}
    assert chunks[-1].usage.completion_tokens == 6


@pytest.mark.parametrize("model", MODELS)
def test_prompts_are_truncated_on_request(client: Any, oracle: Oracle, model: str) -> None:
    for side, kept in (("left", PROMPT[-5:]), ("right", PROMPT[:5])):
        response = complete(
            client, model, text_of(PROMPT), extra_body={"truncate_prompt_tokens": 5, "truncation_side": side}
        )
        assert response.choices[0].text.split() == text_of(oracle.greedy(model, kept)).split()
        assert response.usage.prompt_tokens == 5


@pytest.mark.parametrize("model", MODELS)
def test_prompts_are_truncated_to_the_context(client: Any, oracle: Oracle, model: str) -> None:
    long = prompt_ids(MAX_MODEL_LEN + 20)
    room = MAX_MODEL_LEN - (PREFIXES[model][0][0].shape[1] if model in PREFIXES else 0)
    options = {"truncate_prompt_tokens": -1, "truncation_side": "left"}
    response = complete(client, model, text_of(long), extra_body=options)
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (room - 1, 1)
    expected = oracle.greedy(model, long[1 - room :], 1)
    assert response.choices[0].text.split() == text_of(expected).split()
    chat = {"messages": [{"role": "user", "content": text_of(long)}], "max_tokens": 6, "temperature": 0}
    assert client.chat.completions.create(model=model, extra_body=options, **chat).usage.prompt_tokens == room - 1
    response = client.responses.create(
        model=model, input=text_of(long), max_output_tokens=6, temperature=0, truncation="auto"
    )
    assert (response.usage.input_tokens, response.usage.output_tokens) == (room - 1, 1)
    # The tokenizer's first three words are special tokens, which answers omit.
    assert response.output_text.split() == text_of([token for token in expected if token > 2]).split()
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model=model, input=text_of(long), max_output_tokens=6)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, extra_body={"truncation": "auto", "prefix_prompt_limit": 5}, **chat)


@pytest.mark.parametrize("model", MODELS)
def test_echo_and_token_ids_hold_no_virtual_token(client: Any, oracle: Oracle, model: str) -> None:
    expected = oracle.greedy(model, PROMPT)
    (choice,) = complete(client, model, PROMPT, echo=True).choices
    assert choice.text.split() == text_of(PROMPT + expected).split()
    (choice,) = complete(client, model, PROMPT, extra_body={"return_token_ids": True}).choices
    assert (choice.prompt_token_ids, choice.token_ids) == (PROMPT, expected)


@pytest.mark.parametrize("model", MODELS)
def test_responses_and_messages(client: Any, oracle: Oracle, model: str) -> None:
    expected = text_of(oracle.greedy(model, PROMPT)).split("</s>")[0].split()
    response = client.responses.create(model=model, input=text_of(PROMPT), max_output_tokens=6, temperature=0)
    assert response.output_text.split() == expected
    assert response.usage.input_tokens == len(PROMPT)
    events = client.responses.create(
        model=model, input=text_of(PROMPT), max_output_tokens=6, temperature=0, stream=True
    )
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas).split() == expected
    message = post(
        client,
        "/messages",
        model=model,
        messages=[{"role": "user", "content": text_of(PROMPT)}],
        max_tokens=6,
        temperature=0,
    )
    assert message["content"][0]["text"].split() == expected
    assert message["usage"]["input_tokens"] == len(PROMPT)


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_of_chats(client: Any, oracle: Oracle, model: str) -> None:
    prompts = [PROMPT, PROMPT[:5]]
    chats = [[{"role": "user", "content": text_of(prompt)}] for prompt in prompts]
    options = {"temperature": 0, "logit_bias": {EOS: -100}, "return_token_ids": True}
    response = post(client, "/chat/completions/batch", model=model, messages=chats, max_tokens=6, **options)
    for prompt, choice in zip(prompts, response["choices"], strict=True):
        assert choice["token_ids"] == oracle.greedy(model, prompt, adjust=forbidden([EOS]))
    assert response["usage"]["prompt_tokens"] == sum(map(len, prompts))
    room = MAX_MODEL_LEN - (PREFIXES[model][0][0].shape[1] if model in PREFIXES else 0)
    response = post(client, "/chat/completions/batch", model=model, messages=chats[:1], **options)
    assert response["usage"]["completion_tokens"] == room - len(PROMPT)


def test_tokenize_shows_real_tokens(client: Any) -> None:
    for model in MODELS:
        assert post(client, "/../tokenize", model=model, prompt=text_of(PROMPT))["tokens"] == PROMPT
        assert post(client, "/../detokenize", model=model, tokens=PROMPT)["prompt"] == text_of(PROMPT)
