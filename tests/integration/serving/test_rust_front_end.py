"""Prefixes through vLLM's Rust front end: what the engine makes of its messages, and the program itself where it is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import openai
import pytest
import torch
from vllm.v1.engine import EngineCoreReadyResponse, FinishReason

from helpers.serving import support
from helpers.serving.rust_front_end import RECORDED, Answer, RustFrontEnd
from helpers.serving.server import CONFIG, ENVIRONMENT, MAX_MODEL_LEN, PREFIXES, complete, serve
from helpers.serving.support import prompt_ids
from vllm_plugin import prefix_adapters


@pytest.fixture(scope="module")
def reference(server_folder: Path) -> support.Reference:
    return support.Reference(server_folder / "model")


@pytest.fixture(scope="module")
def front_end(server_folder: Path) -> Iterator[RustFrontEnd]:
    from vllm.engine.arg_utils import EngineArgs

    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "block_size": support.BLOCK_SIZE}
    config = EngineArgs(
        **{"model": str(server_folder / "model"), "skip_tokenizer_init": True, "max_model_len": MAX_MODEL_LEN},
        **settings,
        **prefix_adapters({}),
    ).create_engine_config()
    front_end = RustFrontEnd(config)
    yield front_end
    front_end.client.shutdown()


@pytest.fixture(scope="module")
def pirate(front_end: RustFrontEnd, server_folder: Path) -> list[Any]:
    return front_end.load("pirate", server_folder / "pirate")


@pytest.fixture(scope="module")
def poet(front_end: RustFrontEnd, server_folder: Path) -> list[Any]:
    return front_end.load("poet", server_folder / "poet")


def test_the_engine_says_that_adapters_may_be_loaded(front_end: RustFrontEnd) -> None:
    ready = msgspec.msgpack.decode(front_end.ready, type=EngineCoreReadyResponse)
    assert ready.supports_lora
    assert ready.max_loras == ready.max_num_seqs


def test_each_request_has_its_own_prefix(
    front_end: RustFrontEnd, pirate: list[Any], poet: list[Any], reference: support.Reference
) -> None:
    prompt = prompt_ids(40)
    cached = {"pirate": 32, "poet": 25, "base": 32}
    for is_warm in (False, True):
        requests = [front_end.request(adapter, prompt) for adapter in (pirate, poet, None)]
        answers = dict(zip(("pirate", "poet", "base"), front_end.ask_all(requests), strict=True))
        for name, answer in answers.items():
            assert answer.token_ids == reference.greedy(prompt, PREFIXES.get(name), 6)
            # Real tokens only, as clients count them.
            assert answer.prefill.num_prompt_tokens == 40
            assert answer.prefill.num_cached_tokens == (cached[name] if is_warm else 0)
        assert len({tuple(answer.token_ids) for answer in answers.values()}) == 3


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("name", ["pirate", "poet", "base"])
def test_prompt_logprobs_are_those_of_real_tokens(
    front_end: RustFrontEnd, pirate: list[Any], poet: list[Any], reference: support.Reference, name: str, length: int
) -> None:
    prompt = prompt_ids(length)
    answer = front_end.ask({"pirate": pirate, "poet": poet}.get(name), prompt, prompt_logprobs=0)
    logprobs = torch.log_softmax(reference.logits(prompt, PREFIXES.get(name)), -1)
    expected = logprobs[range(length - 1), prompt[1:]]
    rows = None if answer.prompt_logprobs is None else answer.prompt_logprobs.logprobs[:, 0]
    torch.testing.assert_close(torch.empty(0) if rows is None else rows, expected, atol=1e-4, rtol=0)


def test_output_ends_with_the_context(front_end: RustFrontEnd, pirate: list[Any]) -> None:
    # What the front end leaves for the output, since it knows nothing of the prefix.
    answer = front_end.ask(pirate, prompt_ids(200), max_tokens=MAX_MODEL_LEN - 200)
    assert (len(answer.token_ids), answer.finish_reason) == (MAX_MODEL_LEN - 200 - 32, FinishReason.LENGTH)


FORGED = {"kv_transfer_params": {"prefix_adapters": "poet"}}


@pytest.mark.parametrize(
    ("who", "length", "changes"),
    [
        ("pirate", 224, {}),
        ("pirate", 40, {"min_tokens": 185, "max_tokens": 200}),
        ("pirate", 40, {"prompt_logprob_token_ids": np.full((39, 1), 5), "prompt_logprob_start": 0}),
        *((who, 40, {"salt": "prefix-adapter:x"}) for who in ("pirate", None)),
        *((who, 40, {"extra_args": FORGED}) for who in ("pirate", None)),
        *((who, 40, {"extra_args": {"kv_transfer_params": {"prefix_adapters": ["poet"]}}}) for who in ("pirate", None)),
        *((who, 40, {"extra_args": {"kv_transfer_params": 5}}) for who in ("pirate", None)),
        # Never loaded: workers would take its folder for that of a LoRA adapter.
        ("stranger", 40, {}),
    ],
)
def test_a_request_is_refused_alone(
    front_end: RustFrontEnd,
    pirate: list[Any],
    reference: support.Reference,
    who: str | None,
    length: int,
    changes: dict[str, Any],
) -> None:
    adapter = {"pirate": pirate, "stranger": ["stranger", 77, pirate[2], None, False, False], None: None}[who]
    prompt = prompt_ids(40)
    refused, answer = front_end.ask_all(
        [front_end.request(adapter, prompt_ids(length), **changes), front_end.request(pirate, prompt)]
    )
    assert (refused.finish_reason, refused.token_ids) == (FinishReason.ERROR, [])
    assert answer.token_ids == reference.greedy(prompt, PREFIXES["pirate"], 6)


def test_a_salt_of_the_client_separates_blocks(front_end: RustFrontEnd, poet: list[Any]) -> None:
    prompt = prompt_ids(64, seed=5)
    cached = [
        front_end.ask(poet, prompt, salt=salt, max_tokens=1).prefill.num_cached_tokens for salt in ("a", "b", "a", None)
    ]
    # The prefix of 7 tokens is the beginning of the first block.
    assert cached == [0, 0, 57, 0]


def test_adapters_come_and_go(
    front_end: RustFrontEnd, server_folder: Path, tmp_path: Path, reference: support.Reference
) -> None:
    def answer(adapter: list[Any]) -> Answer:
        return front_end.ask(adapter, prompt_ids(40))

    def expected(prefix: support.Prefix) -> list[int]:
        return reference.greedy(prompt_ids(40), prefix, 6)

    first, second = (support.random_prefix(CONFIG, 20, seed=seed) for seed in (31, 32))
    folders = [
        support.write_adapter(tmp_path / str(number), CONFIG, each) for number, each in enumerate((first, second))
    ]
    old = front_end.load("late", folders[0])
    assert answer(old).token_ids == expected(first)
    new = front_end.load("late", folders[1], load_inplace=True)
    assert answer(new).token_ids == expected(second) != expected(first)
    # One that was on its way.
    assert answer(old).token_ids == expected(first)
    assert front_end.unload(new)
    assert answer(new).token_ids == expected(second)
    # The name is free, and so is the folder.
    assert answer(front_end.load("late", folders[0])).token_ids == expected(first)


def test_what_cannot_be_served_is_refused_when_it_is_loaded(
    front_end: RustFrontEnd, server_folder: Path, tmp_path: Path, pirate: list[Any]
) -> None:
    prefix = support.random_prefix(CONFIG, 4)
    chat = support.write_adapter(tmp_path / "chat", CONFIG, prefix, context={"chat_template": "{{ messages }}"})
    lora = support.write_adapter(tmp_path / "lora", CONFIG, prefix, peft_type="LORA")
    for path, message in (
        (chat, "brings its own chat template, and vLLM's Rust front end cannot serve it; unset VLLM_USE_RUST_FRONTEND"),
        (lora, "not a prefix"),
        (server_folder / "model", "No adapter_config.json"),
        (tmp_path / "nothing", "neither a folder nor a Hub repository"),
    ):
        with pytest.raises(Exception, match=message):
            front_end.load("refused", path)
    assert front_end.ask(pirate, prompt_ids(9)).finish_reason == FinishReason.LENGTH


PROGRAM = os.environ.get("VLLM_RUST_FRONTEND_PATH")


@pytest.mark.soak
@pytest.mark.skipif(not PROGRAM, reason="VLLM_RUST_FRONTEND_PATH does not name vllm-rs, which vLLM's CUDA wheels have")
def test_a_server(server_folder: Path, monkeypatch: pytest.MonkeyPatch, reference: support.Reference) -> None:
    version = subprocess.run([str(PROGRAM), "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    # Record what another release sends again.
    assert f"vllm-rs {version}" == RECORDED["recorded_from"]
    for name, value in {
        "VLLM_USE_RUST_FRONTEND": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES": str(server_folder),
    }.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    options = (
        "--prefix-adapter",
        f"pirate={server_folder / 'pirate'}",
        "--lora-modules",
        f"poet={server_folder / 'poet'}",
    )
    prompt = prompt_ids(40)
    with serve(server_folder, *options, adapters={}) as client:

        def check(name: str, prefix: support.Prefix | None, cached: int) -> None:
            answer = complete(client, name, prompt, extra_body={"return_token_ids": True})
            assert answer.choices[0].token_ids == reference.greedy(prompt, prefix, 6)
            assert answer.choices[0].prompt_token_ids == prompt
            usage = answer.usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (40, 6)
            assert usage.prompt_tokens_details.cached_tokens == cached

        assert [model.id for model in client.models.list()] == ["base", "pirate", "poet"]
        for is_warm in (False, True):
            for name, cached in (("base", 32), ("pirate", 32), ("poet", 25)):
                check(name, PREFIXES.get(name), cached if is_warm else 0)
        for name in ("pirate", "poet", "base"):
            answer = complete(client, name, prompt, 1, echo=True, logprobs=0).choices[0].logprobs
            logprobs = torch.log_softmax(reference.logits(prompt, PREFIXES.get(name)), -1)
            assert answer.token_logprobs[1:40] == pytest.approx(logprobs[range(39), prompt[1:]].tolist(), abs=1e-4)
        chat = client.chat.completions.create(
            model="pirate",
            messages=[{"role": "user", "content": support.text_of(prompt)}],
            max_tokens=6,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        assert chat.choices[0].token_ids == reference.greedy(prompt, PREFIXES["pirate"], 6)  # type: ignore[attr-defined]
        # With the reason and HTTP 400 from vLLM 0.33 on.
        with pytest.raises(openai.APIStatusError):
            complete(client, "pirate", prompt_ids(224))
        client.post(
            "/load_lora_adapter", body={"lora_name": "late", "lora_path": str(server_folder / "poet")}, cast_to=str
        )
        check("late", PREFIXES["poet"], 0)
        body = {"lora_name": "late", "lora_path": str(server_folder / "pirate"), "load_inplace": True}
        client.post("/load_lora_adapter", body=body, cast_to=str)
        check("late", PREFIXES["pirate"], 0)
        client.post("/unload_lora_adapter", body={"lora_name": "late"}, cast_to=str)
        with pytest.raises(openai.NotFoundError, match="late"):
            complete(client, "late", prompt)
        check("pirate", PREFIXES["pirate"], 32)
