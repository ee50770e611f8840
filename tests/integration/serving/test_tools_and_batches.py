"""Tool calls and the batch API, each in its own process, with a tokenizer that can encode JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.serving import server, support

pytestmark = pytest.mark.soak
CONFIG = support.llama_config(vocab_size=300)
MODELS = ["base", *server.PREFIXES]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "order",
            "parameters": {
                "type": "object",
                "properties": {"dish": {"enum": ["soup", "rice", "beans", "bread"]}, "spicy": {"type": "boolean"}},
                "required": ["dish", "spicy"],
                "additionalProperties": False,
            },
        },
    }
]
CANCEL = {
    "type": "function",
    "function": {
        "name": "cancel",
        "parameters": {
            "type": "object",
            "properties": {"reason": {"enum": ["late", "cold"]}},
            "required": ["reason"],
            "additionalProperties": False,
        },
    },
}
MESSAGES = [{"role": "user", "content": "name: Aromi, food: Italian"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, subword_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    support.write_model(folder / "model", CONFIG)
    subword_tokenizer.save_pretrained(folder / "model")
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    (folder / "model" / "chat_template.jinja").write_text(template)
    for name, prefix in server.PREFIXES.items():
        support.write_adapter(folder / name, CONFIG, prefix)
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Any]:
    with server.serve(folder, "--enable-auto-tool-choice", "--tool-call-parser", "hermes") as client:
        yield client


def test_a_call_among_text_is_parsed(client: Any) -> None:
    pattern = (
        r'<tool_call>\n\{"name": "order", "arguments": \{"dish": "(soup|rice)", "spicy": (true|false)\}\}\n</tool_call>'
    )
    for model in MODELS:
        (choice,) = client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            tools=TOOLS,
            temperature=0,
            max_tokens=100,
            extra_body={"structured_outputs": {"regex": pattern}},
        ).choices
        assert choice.finish_reason == "tool_calls"
        assert json.loads(choice.message.tool_calls[0].function.arguments)["dish"] in ("soup", "rice")


def test_calls_side_by_side(client: Any) -> None:
    call = r'<tool_call>\n\{"name": "order", "arguments": \{"dish": "(soup|rice)"\}\}\n</tool_call>'
    for model in MODELS:
        for parallel, count in ((True, 2), (False, 1)):
            (choice,) = client.chat.completions.create(
                model=model,
                messages=MESSAGES,
                tools=TOOLS,
                parallel_tool_calls=parallel,
                temperature=0,
                max_tokens=150,
                extra_body={"structured_outputs": {"regex": f"{call}\n{call}"}},
            ).choices
            assert [call.function.name for call in choice.message.tool_calls] == ["order"] * count


@pytest.mark.parametrize("forced", ["required", {"type": "function", "function": {"name": "cancel"}}], ids=str)
def test_a_call_that_is_forced(client: Any, subword_tokenizer: PreTrainedTokenizerFast, forced: Any) -> None:
    # A random model would generate whitespace forever where JSON allows it, and call tools again and again.
    blanks = [token for word, token in subword_tokenizer.get_vocab().items() if not set(word) - set("ĠĊĉč")]
    # Otherwise vLLM accepts any JSON as arguments.
    tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in (*TOOLS, CANCEL)]
    options: dict[str, Any] = {
        **{"messages": MESSAGES, "tools": tools, "tool_choice": forced, "temperature": 0, "max_tokens": 120},
        "logit_bias": {subword_tokenizer.eos_token_id: 100, **dict.fromkeys(blanks, -100)},
    }
    for model in MODELS:
        (choice,) = client.chat.completions.create(model=model, **options).choices
        (call,) = choice.message.tool_calls
        name, arguments = call.function.name, json.loads(call.function.arguments)
        assert name == "cancel" or forced == "required"
        assert arguments.keys() == ({"dish", "spicy"} if name == "order" else {"reason"})
        # OpenAI's format.
        assert choice.finish_reason == ("tool_calls" if forced == "required" else "stop")
        streamed = [
            delta.function
            for chunk in client.chat.completions.create(model=model, stream=True, **options)
            for choice in chunk.choices
            for delta in choice.delta.tool_calls or []
        ]
        assert "".join(delta.name or "" for delta in streamed) == name
        assert json.loads("".join(delta.arguments or "" for delta in streamed)) == arguments


def test_json_of_a_schema(client: Any) -> None:
    schema = TOOLS[0]["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema, "strict": True}}
    for model in MODELS:
        (choice,) = client.chat.completions.create(
            model=model, messages=MESSAGES, response_format=form, temperature=0, max_tokens=100
        ).choices
        assert json.loads(choice.message.content).keys() == {"dish", "spicy"}


def test_a_batch_file(client: Any, folder: Path, tmp_path: Path) -> None:
    body = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    rows = [
        {
            **{"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions"},
            "body": {**body, "model": model, "messages": [{"role": "user", "content": f"name: {number}"}]},
        }
        for number in range(4)
        for model in [*MODELS, "nobody"]
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    subprocess.run(
        [
            *(sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "--model", str(folder / "model")),
            *("-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--served-model-name", "base"),
            *(
                "--dtype",
                "float32",
                "--enforce-eager",
                "--block-size",
                str(support.BLOCK_SIZE),
                "--max-model-len",
                "256",
            ),
            *("--prefix-adapter", *(f"{name}={folder / name}" for name in server.PREFIXES)),
        ],
        env=server.ENVIRONMENT,
        check=True,
    )
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(results) == len(rows)
    for row, result in zip(rows, results, strict=True):
        if row["body"]["model"] == "nobody":
            assert result["response"]["status_code"] == 404 or result["error"]
            continue
        online = client.chat.completions.create(**row["body"])
        said = result["response"]["body"]
        assert said["choices"][0]["message"]["content"] == online.choices[0].message.content
        assert said["usage"]["prompt_tokens"] == online.usage.prompt_tokens
