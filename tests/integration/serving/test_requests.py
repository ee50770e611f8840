"""The options of a request, and requests that cannot be served: refused in one sentence, and the engine goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from helpers.serving.engines import Engine
from helpers.serving.support import prompt_ids
from vllm_plugin import PrefixAdapterRequest


def ask(engine: Engine, prompt: dict[str, Any], name: str | None, **params: Any) -> Any:
    from vllm import SamplingParams

    return engine.llm.generate(
        prompt,
        SamplingParams(**{"max_tokens": 2, "detokenize": False, **params}),
        lora_request=None if name is None else PrefixAdapterRequest(name),
        use_tqdm=False,
    )


@pytest.mark.parametrize("name", ["p1", "p7", "p32", "p33", "p130"])
def test_prompt_logprobs_are_those_of_real_tokens(llama: Engine, name: str) -> None:
    names = [name, None, name, None, name, name]
    prompts = [prompt_ids(count, seed=count) for count in (1, 40, 2, 31, 70, 70)]
    for _ in range(2):
        # The second time, its blocks are cached, but this request must not read them.
        outputs = llama.generate(names, prompts, max_tokens=3, prompt_logprobs=2, logprobs=1)
        llama.check_prompt_logprobs(outputs, names)
        assert [output.num_cached_tokens for output in outputs] == [0] * 6
        for output, prompt, who in zip(outputs, prompts, names, strict=True):
            prefix = None if who is None else llama.prefixes[who]
            assert output.outputs[0].token_ids == llama.reference.greedy(prompt, prefix, 3)
    llama.check(names, prompts)


def test_prompt_logprobs_come_in_every_form(llama: Engine) -> None:
    names = ["p33", None]
    prompts = [prompt_ids(20)] * 2
    whole = llama.generate(names, prompts, max_tokens=1, prompt_logprobs=0)
    llama.check_prompt_logprobs(whole, names)
    assert all(len(row) == 1 for output in whole for row in output.prompt_logprobs[1:])
    flat = llama.generate(names, prompts, max_tokens=1, prompt_logprobs=3, flat_logprobs=True)
    assert [len(output.prompt_logprobs) for output in flat] == [20, 20]
    llama.check_prompt_logprobs(flat, names)


def test_prompt_logprobs_always_skip_the_prefix_cache(llama: Engine) -> None:
    prompt = prompt_ids(80)
    for _ in range(2):
        outputs = llama.generate(["p33"], [prompt], prompt_logprobs=1, skip_reading_prefix_cache=False)
        llama.check_prompt_logprobs(outputs, ["p33"])


def test_a_request_may_skip_the_prefix_cache(llama: Engine) -> None:
    prompt = prompt_ids(80)
    for _ in range(2):
        (output,) = llama.generate(["p33"], [prompt], skip_reading_prefix_cache=True)
        assert output.num_cached_tokens == 0
        assert output.outputs[0].token_ids == llama.reference.greedy(prompt, llama.prefixes["p33"], 10)
    assert llama.counts("loads") == {"p33": 2}
    # Other requests may read what it computed.
    assert llama.generate(["p33"], [prompt])[0].num_cached_tokens == 63


@pytest.mark.parametrize(("name", "p"), [("p33", 33), (None, 0)])
def test_offline_beams_reach_the_end_of_the_context(
    llama: Engine, monkeypatch: pytest.MonkeyPatch, name: str | None, p: int
) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    # The engine has no tokenizer.
    tokenizer = SimpleNamespace(eos_token_id=2, decode=lambda tokens, **_: "")
    monkeypatch.setattr(llama.llm.renderer, "get_tokenizer", lambda: tokenizer)
    prompt = prompt_ids(512 - p - 4)

    def search(max_tokens: int) -> Any:
        params = BeamSearchParams(beam_width=2, max_tokens=max_tokens, ignore_eos=True)
        adapter = None if name is None else PrefixAdapterRequest(name)
        return llama.llm.beam_search([{"prompt_token_ids": prompt}], params, lora_request=adapter)

    (output,) = search(4)
    expected = llama.reference.beams(prompt, name and llama.prefixes[name], 2, 4)
    assert [beam.tokens[len(prompt) :] for beam in output.sequences] == expected
    # vLLM does not truncate here, with or without a prefix.
    with pytest.raises(VLLMValidationError, match="tokens"):
        search(5)
    assert not llama.llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize(
    ("name", "prompt", "params", "message"),
    [
        ("nobody", {}, {}, "'nobody' does not exist; this engine has: p1, p7"),
        ("p130", {"prompt_token_ids": prompt_ids(382)}, {}, "shorten the prompt to at most 381 tokens"),
        ("p33", {}, {"min_tokens": 475, "max_tokens": 500}, "`min_tokens` must be <= 474"),
        ("p33", {"cache_salt": "prefix-adapter:p7"}, {}, "`cache_salt` may not start with 'prefix-adapter:'"),
        (None, {"cache_salt": "prefix-adapter:p7"}, {}, "`cache_salt` may not start with 'prefix-adapter:'"),
        (None, {}, {"extra_args": {"kv_transfer_params": 5}}, "`kv_transfer_params` must be an object, got 5"),
        (None, {}, {"extra_args": {"kv_transfer_params": {"prefix_adapters": "p7"}}}, "may not hold 'prefix_adapters'"),
        (
            "p33",
            {},
            {"extra_args": {"kv_transfer_params": {"prefix_adapters": "p7"}}},
            "may not hold 'prefix_adapters'",
        ),
    ],
)
def test_invalid_requests_are_refused(
    llama: Engine, name: str | None, prompt: dict[str, Any], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
        ask(llama, {"prompt_token_ids": prompt_ids(5), **prompt}, name, **params)
    assert message in str(caught.value)
    llama.check(["p33", None], [prompt_ids(5)] * 2, max_tokens=2)


def test_vllm_handles_lora_requests_of_loras(llama: Engine) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    with pytest.raises(VLLMValidationError, match="LoRA is not enabled"):
        llama.llm.generate({"prompt_token_ids": [5]}, lora_request=LoRARequest("mine", 1, "/lora"), use_tqdm=False)
    llama.check(["p7", None], [prompt_ids(5)] * 2, max_tokens=2)


def test_the_base_model_supports_what_prefixes_do_not(llama: Engine) -> None:
    (output,) = ask(llama, {"prompt_token_ids": prompt_ids(5), "cache_salt": "mine"}, None, prompt_logprobs=0)
    assert len(output.prompt_logprobs) == 5
    ask(llama, {"prompt_token_ids": prompt_ids(511)}, None)


def test_one_refused_prompt_refuses_the_batch_and_frees_it(llama: Engine) -> None:
    with pytest.raises(ValueError, match="shorten the prompt"):
        llama.generate(["p33", "p130"], [prompt_ids(5), prompt_ids(400)])
    assert not llama.llm.llm_engine.has_unfinished_requests()


def test_streaming_input_is_refused(llama: Engine) -> None:
    from vllm import SamplingParams

    engine = llama.llm.llm_engine
    with pytest.raises(ValueError, match="Streaming input is not supported"):
        engine.input_processor.process_inputs(
            "id",
            {"type": "token", "prompt_token_ids": [5]},
            SamplingParams(max_tokens=1),
            supported_tasks=engine.get_supported_tasks(),
            lora_request=PrefixAdapterRequest("p7"),
            resumable=True,
        )
