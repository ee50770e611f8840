"""The OpenAI-compatible server, started by `prefix-serve` and used through the `openai` client."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers.serving import support
from helpers.serving.server import CONFIG, MAX_MODEL_LEN, PREFIXES, complete, launch, load, unload
from helpers.serving.support import prompt_ids, text_of


def test_models_are_listed_with_the_base_as_parent(client: Any, server_folder: Path) -> None:
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["base", "pirate", "poet"]
    assert models["base"].parent is None
    assert models["pirate"].parent == "base"
    assert models["pirate"].root == str(server_folder / "pirate")


def test_each_model_answers_as_transformers_does_in_one_batch(client: Any, server_folder: Path) -> None:
    reference = support.Reference(server_folder / "model")
    jobs = [(name, prompt_ids(8 + 5 * seed, seed=seed)) for seed in range(4) for name in ("base", "pirate", "poet")]
    with ThreadPoolExecutor(len(jobs)) as pool:
        responses = list(pool.map(lambda job: complete(client, job[0], job[1]), jobs))
    for (name, prompt), response in zip(jobs, responses, strict=True):
        assert response.model == name
        assert response.usage.prompt_tokens == len(prompt)
        expected = reference.greedy(prompt, PREFIXES.get(name), 6)
        assert response.choices[0].text.split() == text_of(expected).split()


def test_the_log_ends_with_models_and_address(client: Any, server_folder: Path) -> None:
    lines = (server_folder / "log").read_text().splitlines()
    (last,) = [index for index, line in enumerate(lines) if "Serving on" in line]
    address = f"http://{client.base_url.host}:{client.base_url.port}"
    assert lines[last].endswith(f"Serving on {address}: base; prefix adapters: pirate, poet")
    # Later lines belong to requests.
    started = [index for index, line in enumerate(lines) if "startup complete" in line]
    assert started
    assert started[-1] < last
    assert any(line.endswith("Blocks of the KV cache hold 32 tokens (--block-size).") for line in lines[:last])


def test_usage_does_not_count_virtual_tokens(client: Any) -> None:
    prompt = prompt_ids(70, seed=50)
    for cached in (None, 64):
        details = complete(client, "pirate", prompt).usage.prompt_tokens_details
        assert (details.cached_tokens if details else None) in ({None, 0} if cached is None else {cached})


def test_chat_and_streaming(client: Any) -> None:
    messages = [{"role": "user", "content": "w5 w6 w7"}]
    options: dict[str, Any] = {
        **{"messages": messages, "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
    }
    whole = client.chat.completions.create(model="poet", **options)
    chunks = list(client.chat.completions.create(model="poet", stream=True, **options))
    assert {chunk.model for chunk in chunks} == {whole.model} == {"poet"}
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == whole.choices[0].message.content
    assert (
        whole.choices[0].message.content
        != client.chat.completions.create(model="base", **options).choices[0].message.content
    )


def test_the_default_length_fills_the_context(client: Any) -> None:
    prompt = prompt_ids(MAX_MODEL_LEN - 32 - 9)
    response = client.chat.completions.create(
        model="pirate",
        messages=[{"role": "user", "content": text_of(prompt)}],
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert response.usage.completion_tokens == 9
    assert response.choices[0].finish_reason == "length"
    assert complete(client, "pirate", prompt, 200).usage.completion_tokens == 9


def test_an_unknown_model_is_404(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match=r"`nobody` does not exist.* base\. Prefix adapters: pirate, poet\."):
        complete(client, "nobody", "w5")


def test_a_client_names_no_path(client: Any, server_folder: Path) -> None:
    new = str(support.write_adapter(server_folder / "unserved", CONFIG, support.random_prefix(CONFIG, 9)))
    with pytest.raises(openai.NotFoundError):
        complete(client, new, "w5")
    for body in ({"lora_path": new}, {"lora_request": ["poet", 1, new]}, {"prefix_path": new, "load_inplace": True}):
        assert complete(client, "poet", "w5", extra_body=body).choices == complete(client, "poet", "w5").choices
    assert [model.id for model in client.models.list()] == ["base", "pirate", "poet"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "prompt", "options", "message"),
    [
        ("pirate", prompt_ids(MAX_MODEL_LEN - 32), {}, "shorten the prompt to at most 223 tokens"),
        ("base", "w5", {"extra_body": {"cache_salt": "prefix-adapter:pirate"}}, "`cache_salt` may not start with"),
        (
            "base",
            "w5",
            {"extra_body": {"kv_transfer_params": {"prefix_adapters": "pirate"}}},
            "choose a prefix adapter with `model`",
        ),
        ("poet", "w5", {"extra_body": {"min_tokens": 250}, "max_tokens": 255}, "`min_tokens` must be <= 248"),
    ],
)
def test_invalid_requests_are_400(
    client: Any, model: str, prompt: Any, options: dict[str, Any], message: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        complete(client, model, prompt, stream=stream, **options)
    assert caught.value.status_code == 400
    assert complete(client, "poet", "w5").model == "poet"


@pytest.mark.parametrize("forged", ["nobody", "pirate", ["x"], {"x": 1}, 7])
def test_forged_transfer_parameters_are_refused(client: Any, forged: Any) -> None:
    """vLLM passes the parameters of a refused request to the connector if they ask for it."""
    body = {"kv_transfer_params": {"do_remote_prefill": True, "prefix_adapters": forged}}
    for model in ("base", "poet"):
        with pytest.raises(openai.BadRequestError, match="choose a prefix adapter with `model`"):
            complete(client, model, "w5", extra_body=body)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "w5"}], stream=True, extra_body=body
            )
    assert complete(client, "poet", "w5").model == "poet"


def test_a_disconnected_client_leaves_the_server_well(client: Any) -> None:
    for _ in range(3):
        stream = complete(client, "pirate", "w5 w6", max_tokens=200, stream=True)
        next(iter(stream))
        stream.close()
    assert complete(client, "pirate", "w5 w6").usage.completion_tokens == 6


def loaded_tokens(client: Any) -> float:
    """Returns how many virtual tokens were copied into the cache since the server started."""
    metrics = client.get("/../metrics", cast_to=str)
    (line,) = re.findall(r"^vllm:external_prefix_cache_hits_total{.*} (.*)$", metrics, re.MULTILINE)
    return float(line)


def test_adapters_come_and_go_and_change_while_the_server_runs(client: Any, server_folder: Path) -> None:
    reference, prompt = support.Reference(server_folder / "model"), prompt_ids(9, seed=60)
    for seed, inplace in ((11, False), (12, True)):
        prefix = support.random_prefix(CONFIG, 40, seed=seed)
        path = support.write_adapter(server_folder / "late" / str(seed), CONFIG, prefix)
        load(client, "late", path, load_inplace=inplace)
        expected = text_of(reference.greedy(prompt, prefix, 6))
        for _ in range(2):
            response = complete(client, "late", prompt)
            assert response.model == "late"
            assert response.choices[0].text.split() == expected.split()
    with pytest.raises(openai.ConflictError):
        load(client, "late", path)
    log = (server_folder / "log").read_text()
    assert "Prefix adapter 'late': 40 virtual tokens, 2 layers, 0.04 MiB, a tail of 8 tokens." in log
    unload(client, "late")
    with pytest.raises(openai.NotFoundError):
        complete(client, "late", prompt)
    assert [model.id for model in client.models.list()] == ["base", "pirate", "poet"]


def test_an_overwritten_folder_is_503_until_it_is_loaded_again(client: Any, server_folder: Path) -> None:
    folder, prompt = server_folder / "over", prompt_ids(9, seed=62)
    reference = support.Reference(server_folder / "model")
    old, new = (support.random_prefix(CONFIG, 200, seed=seed) for seed in (15, 16))
    load(client, "over", support.write_adapter(folder, CONFIG, old))
    assert complete(client, "over", prompt).choices[0].text.split() == text_of(reference.greedy(prompt, old, 6)).split()
    support.write_adapter(folder, CONFIG, new)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    told = r'could not be read into the cache.*load it again, by POST /v1/load_prefix_adapter with "load_inplace": true'
    # First half of the file, as if it were still being copied.
    for content in (whole[: len(whole) // 2], whole):
        (folder / "adapter_model.safetensors").write_bytes(content)
        for ask in (
            lambda: complete(client, "over", prompt),
            lambda: complete(client, "over", prompt, n=2, extra_body={"use_beam_search": True}),
            lambda: client.chat.completions.create(model="over", messages=[{"role": "user", "content": "w5"}]),
            lambda: client.responses.create(model="over", input="w5"),
        ):
            with pytest.raises(openai.InternalServerError, match=told) as caught:
                ask()
            assert caught.value.status_code == 503
            assert caught.value.body["type"] == "ServiceUnavailableError"
        with pytest.raises(openai.APIError, match=told):
            list(complete(client, "over", prompt, stream=True))
        assert complete(client, "poet", "w5").model == "poet"
    load(client, "over", folder, load_inplace=True)
    assert complete(client, "over", prompt).choices[0].text.split() == text_of(reference.greedy(prompt, new, 6)).split()
    unload(client, "over")


def test_a_request_outlives_its_adapter(client: Any, server_folder: Path) -> None:
    prefix, prompt = support.random_prefix(CONFIG, 33, seed=13), prompt_ids(5, seed=61)
    load(client, "leaving", support.write_adapter(server_folder / "leaving", CONFIG, prefix))
    stream = complete(client, "leaving", prompt, 60, stream=True)
    words = next(iter(stream)).choices[0].text
    unload(client, "leaving")
    words += "".join(chunk.choices[0].text for chunk in stream)
    expected = support.Reference(server_folder / "model").greedy(prompt, prefix, 60)
    assert words.split() == text_of(expected).split()


def test_warmed_up_prefixes_are_in_the_cache_before_their_first_request(client: Any, server_folder: Path) -> None:
    prefix = support.random_prefix(CONFIG, 64, seed=14)
    before = loaded_tokens(client)
    assert before >= 32  # those of `pirate`, which is aligned
    load(client, "warm", support.write_adapter(server_folder / "warm", CONFIG, prefix))
    assert loaded_tokens(client) == before + 64
    complete(client, "warm", "w5 w6")
    assert loaded_tokens(client) == before + 64
    unload(client, "warm")


def test_a_failed_start_prints_one_line(server_folder: Path) -> None:
    server = launch(server_folder, "--prefix-adapter", "x=/nowhere", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, errors = server.communicate()
    assert server.returncode == 1
    assert errors.strip().splitlines()[-1] == (
        "prefix-serve: error: Prefix adapter 'x': No prefix adapter at '/nowhere': it is neither a folder nor a Hub repository."
    )
    assert "Traceback" not in errors


def test_command_line_errors_name_prefix_serve(server_folder: Path) -> None:
    server = launch(server_folder, "--prefix-adapter", "x", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, errors = server.communicate()
    assert server.returncode == 2
    assert errors.strip().splitlines()[-2:] == [
        "usage: prefix-serve [model_tag] [options]",
        "prefix-serve: error: argument --prefix-adapter: expected NAME=PATH_OR_REPO, got 'x'",
    ]


def test_metrics_and_log_list_the_adapters(client: Any, server_folder: Path) -> None:
    labels = '{adapter="poet",engine="0",model_name="base"}'

    def count(name: str) -> float:
        text = client.get("/../metrics", cast_to=str)
        (line,) = [line for line in text.splitlines() if line.startswith(f"vllm:prefix_adapter_{name}_total{labels}")]
        return float(line.rpartition(" ")[2])

    complete(client, "poet", "w5")
    before = {name: count(name) for name in ("requests", "loads", "loaded_tokens")}
    complete(client, "poet", "w5")
    # Its 7 virtual tokens do not fill a block.
    assert {name: count(name) - before[name] for name in before} == {"requests": 1, "loads": 1, "loaded_tokens": 7}
    assert 'vllm:prefix_adapters_resident{engine="0",model_name="base"}' in client.get("/../metrics", cast_to=str)
    log = (server_folder / "log").read_text()
    assert "Prefix adapter 'pirate': 32 virtual tokens, 2 layers, 0.03 MiB, aligned." in log
    assert "Prefix adapter 'poet': 7 virtual tokens, 2 layers, 0.01 MiB, a tail of 7 tokens." in log
    assert "are shared whole: 'poet' (7; better 32)." in log


def test_gateways_see_which_adapters_run(client: Any) -> None:
    """By the metric of the model server protocol, which vLLM has with LoRA only."""
    stream = complete(client, "pirate", "w5", max_tokens=200, stream=True)
    next(iter(stream))
    running = set()
    for _ in range(50):
        text = client.get("/../metrics", cast_to=str)
        lines = [line for line in text.splitlines() if line.startswith("vllm:lora_requests_info{")]
        # The last one that was set.
        latest = max(lines, key=lambda line: float(line.rpartition(" ")[2]), default="")
        running.add(latest.partition('running_lora_adapters="')[2].partition('"')[0])
        if "pirate" in running:
            break
    assert "pirate" in running
    assert "max_lora=" in latest
    stream.close()


def test_beam_search_and_tokenize_with_adapters(client: Any) -> None:
    response = complete(client, "pirate", "w5 w6", n=2, extra_body={"use_beam_search": True})
    assert len({choice.text for choice in response.choices}) == 2
    # Up to the end of the context, which includes virtual tokens.
    body = {"use_beam_search": True, "ignore_eos": True}
    long = complete(client, "pirate", "w5", n=2, max_tokens=MAX_MODEL_LEN - 1, extra_body=body)
    assert long.usage.completion_tokens == 2 * (MAX_MODEL_LEN - 1 - 32)
    tokens = client.post("/../tokenize", body={"model": "pirate", "prompt": "w5 w6"}, cast_to=object)
    assert tokens["count"] == 2
