"""`prefix-ext compile`: a server answers behind a compiled prefix as the base model does with the text in its prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.serving.server import complete, load, unload
from helpers.serving.support import prompt_ids, text_of
from peft_prefix_ext.distillation.compile import compile_context
from peft_prefix_ext.distillation.context import chat_context, text_context

OPENING = [
    {"role": "system", "content": text_of(prompt_ids(40, seed=1))},
    {"role": "user", "content": text_of(prompt_ids(9, seed=2))},
    {"role": "assistant", "content": text_of(prompt_ids(6, seed=3))},
]
TEXT = text_of(prompt_ids(64, seed=4))
TURNS = [{"role": "user", "content": text_of(prompt_ids(5, seed=seed))} for seed in (5, 6)]
WHOLE = {"ignore_eos": True, "skip_special_tokens": False}
# Unlike the server's own template, it writes something before the first message, as most do.
TEMPLATE = "{{ tools | length if tools }}w9 w8 {% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(server_folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(server_folder / "model")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module", autouse=True)
def compiled(client: Any, server_folder: Path, tokenizer: Any) -> Iterator[None]:
    model = AutoModelForCausalLM.from_pretrained(server_folder / "model")
    contexts = {"opening": chat_context(tokenizer, OPENING), "text": text_context(tokenizer, [TEXT])}
    for name, context in contexts.items():
        compile_context(model, context, server_folder / name)
        load(client, name, server_folder / name)
    yield
    for name in contexts:
        unload(client, name)


def chat(client: Any, model: str, messages: list[dict[str, str]], **extra: Any) -> tuple[str, int]:
    """Returns the answer and the number of tokens in the prompt."""
    response = client.chat.completions.create(
        model=model, messages=messages, max_tokens=8, temperature=0, extra_body={**WHOLE, **extra}
    )
    return response.choices[0].message.content, response.usage.prompt_tokens


def text(client: Any, model: str, prompt: Any) -> str:
    return str(complete(client, model, prompt, max_tokens=8).choices[0].text)


@pytest.mark.parametrize("turn", TURNS)
def test_a_chat_behind_its_opening(client: Any, tokenizer: Any, turn: dict[str, str]) -> None:
    whole = tokenizer.apply_chat_template([*OPENING, turn]).input_ids
    expected = text(client, "base", whole)
    assert expected != text(client, "base", tokenizer.apply_chat_template([turn]).input_ids)
    for _ in range(2):
        # Clients see the tokens of their own messages only.
        assert chat(client, "opening", [turn]) == (expected, 5)


def test_a_chat_of_several_turns(client: Any, tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": text_of(prompt_ids(3, seed=8))}
    turns = [TURNS[0], answer, TURNS[1]]
    expected = text(client, "base", tokenizer.apply_chat_template([*OPENING, *turns]).input_ids)
    assert chat(client, "opening", turns) == (expected, 13)


def test_a_prompt_behind_a_text(client: Any) -> None:
    prompt = text_of(prompt_ids(5, seed=7))
    assert text(client, "text", prompt) == text(client, "base", f"{TEXT} {prompt}") != text(client, "base", prompt)


def test_no_client_chooses_the_template(client: Any) -> None:
    for name in ("opening", "pirate"):
        expected = chat(client, name, TURNS[:1])
        assert chat(client, name, TURNS[:1], prefix_chat_template="{{ 'w1 w2 w3' }}") == expected
    with pytest.raises(openai.BadRequestError, match="trust"):
        chat(client, "opening", TURNS[:1], chat_template="{{ 'w1 w2 w3' }}")


def test_tools_would_change_the_opening(client: Any) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    with pytest.raises(
        openai.BadRequestError, match="which tools or other arguments of the chat template would change"
    ):
        chat(client, "opening", TURNS[:1], tools=[tool], tool_choice="none")
    # The server goes on.
    assert chat(client, "opening", TURNS[:1])
