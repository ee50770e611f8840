"""Offline requests that load, replace or reload an adapter by its path, and the errors if they cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.serving import support
from helpers.serving.engines import Engine
from helpers.serving.support import prompt_ids
from vllm_plugin import PrefixAdapterRequest, remove_prefix_adapter
from vllm_plugin.adapters import runtime_loading
from vllm_plugin.adapters.registry import registry_in
from vllm_plugin.worker.prefix_manager import LRUPool

PROMPT = prompt_ids(20)


@pytest.fixture
def engine(llama: Engine) -> Iterator[Engine]:
    """The shared engine; adapters that a test loads are removed afterwards."""
    registry = registry_in(config_of(llama).kv_transfer_config)
    before = {adapter.spec.name for adapter in registry.adapters()}
    yield llama
    for adapter in registry.adapters():
        if adapter.spec.name not in before:
            registry.remove(adapter.spec.name)


@pytest.fixture
def write(tmp_path: Path, llama: Engine) -> Callable[..., tuple[Path, support.Prefix]]:
    """Writes an adapter of 33 tokens; its content depends on the seed."""

    def write(name: str, seed: int) -> tuple[Path, support.Prefix]:
        prefix = support.random_prefix(llama.config, 33, seed=seed)
        return support.write_adapter(tmp_path / name, llama.config, prefix), prefix

    return write


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were read during the test."""
    paths: list[str] = []
    original = runtime_loading.open_adapter
    monkeypatch.setattr(
        runtime_loading, "open_adapter", lambda option, *rest: (paths.append(option.path), original(option, *rest))[1]
    )
    return paths


def config_of(engine: Engine) -> Any:
    return engine.llm.llm_engine.vllm_config


def ask(engine: Engine, *requests: PrefixAdapterRequest | None) -> list[list[int]]:
    """Sends the same prompt with each of the requests, in one call."""
    from vllm import SamplingParams

    outputs = engine.llm.generate(
        [{"prompt_token_ids": PROMPT}] * len(requests),
        SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False),
        lora_request=list(requests),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def answer(engine: Engine, prefix: support.Prefix | None) -> list[int]:
    return engine.reference.greedy(PROMPT, prefix, 8)


def test_a_path_loads_an_adapter_and_another_replaces_it_in_place(engine: Engine, write: Any) -> None:
    (first, v1), (second, v2) = write("v1", 101), write("v2", 102)
    assert ask(engine, PrefixAdapterRequest("task", 1, str(first))) == [answer(engine, v1)]
    # Then the name is enough, and the same path means the same adapter.
    assert ask(engine, PrefixAdapterRequest("task"), PrefixAdapterRequest("task", 7, first)) == [answer(engine, v1)] * 2
    with pytest.raises(
        ValueError, match=r"\AThe prefix adapter 'task' was loaded from '.*v1'; set `load_inplace=True`"
    ):
        ask(engine, PrefixAdapterRequest("task", 2, str(second)))
    assert ask(engine, PrefixAdapterRequest("task")) == [answer(engine, v1)]
    assert ask(engine, PrefixAdapterRequest("task", 2, str(second), load_inplace=True)) == [answer(engine, v2)]
    assert ask(engine, PrefixAdapterRequest("task"), None) == [answer(engine, v2), answer(engine, None)]


def test_a_lora_request_of_a_prefix_is_one_for_the_prefix(engine: Engine, write: Any) -> None:
    """In an engine without LoRA, which would refuse any other."""
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    (first, v1), (second, v2) = write("v1", 115), write("v2", 116)
    assert ask(engine, LoRARequest("tone", 1, str(first)), None) == [answer(engine, v1), answer(engine, None)]
    assert ask(engine, LoRARequest("tone", 1, str(second), load_inplace=True)) == [answer(engine, v2)]
    assert ask(engine, PrefixAdapterRequest("tone")) == [answer(engine, v2)]
    assert answer(engine, v1) != answer(engine, v2)
    remove_prefix_adapter(engine.llm, "tone")
    with pytest.raises(ValueError, match="'tone' does not exist"):
        ask(engine, PrefixAdapterRequest("tone"))
    with pytest.raises(VLLMValidationError, match="LoRA is not enabled"):
        ask(engine, LoRARequest("lora", 2, str(first.parent / "nowhere")))


def test_load_inplace_reads_the_folder_again(engine: Engine, write: Any) -> None:
    folder, v1 = write("task", 103)
    assert ask(engine, PrefixAdapterRequest("task", 1, str(folder))) == [answer(engine, v1)]
    _, v2 = write("task", 104)
    # Neither the name nor the path asks to reload, so the checked content stays.
    assert ask(engine, PrefixAdapterRequest("task"), PrefixAdapterRequest("task", 1, str(folder))) == (
        [answer(engine, v1)] * 2
    )
    assert ask(engine, PrefixAdapterRequest("task", load_inplace=True)) == [answer(engine, v2)]
    _, v3 = write("task", 105)
    assert ask(engine, PrefixAdapterRequest("task", 1, str(folder), load_inplace=True)) == [answer(engine, v3)]
    assert ask(engine, PrefixAdapterRequest("task")) == [answer(engine, v3)]


def test_each_request_of_a_call_has_the_content_that_it_names(engine: Engine, write: Any) -> None:
    (first, v1), (second, v2) = write("v1", 106), write("v2", 107)
    requests = [
        PrefixAdapterRequest("task", 1, str(first)),
        PrefixAdapterRequest("task", 1, str(second), load_inplace=True),
        PrefixAdapterRequest("task"),
    ]
    assert ask(engine, *requests) == [answer(engine, v1), answer(engine, v2), answer(engine, v2)]


def test_a_call_reads_a_folder_once_and_the_next_call_again(
    engine: Engine, write: Any, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.sampling_params import BeamSearchParams

    folder, prefix = write("task", 108)
    request = PrefixAdapterRequest("task", 1, str(folder), load_inplace=True)
    for count in (1, 2):
        assert ask(engine, *[request] * 3) == [answer(engine, prefix)] * 3
        assert opened == [str(folder)] * count
    tokenizer = SimpleNamespace(eos_token_id=2, decode=lambda tokens, **_: "")
    monkeypatch.setattr(engine.llm.renderer, "get_tokenizer", lambda: tokenizer)
    params = BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True)
    (output,) = engine.llm.beam_search([{"prompt_token_ids": PROMPT}], params, lora_request=request)
    beams = [beam.tokens[len(PROMPT) :] for beam in output.sequences]
    assert beams == engine.reference.beams(PROMPT, prefix, 2, 4)
    assert opened == [str(folder)] * 3


def test_add_request_loads_adapters_as_well(engine: Engine, write: Any) -> None:
    from vllm import SamplingParams

    folder, prefix = write("task", 109)
    llm_engine, outputs = engine.llm.llm_engine, []
    llm_engine.add_request(
        "alone",
        {"type": "token", "prompt_token_ids": PROMPT},
        SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False),
        lora_request=PrefixAdapterRequest("task", 1, str(folder)),
    )
    while llm_engine.has_unfinished_requests():
        outputs += [output for output in llm_engine.step() if output.finished]
    assert [list(output.outputs[0].token_ids) for output in outputs] == [answer(engine, prefix)]


def test_concurrent_requests_read_a_path_once(engine: Engine, write: Any, opened: list[str]) -> None:
    folder, _ = write("task", 110)
    request = PrefixAdapterRequest("task", 1, str(folder))
    with ThreadPoolExecutor(8) as pool:
        specs = list(pool.map(lambda _: runtime_loading.adapter_of(request, config_of(engine)), range(16)))
    assert opened == [str(folder)]
    assert len(set(specs)) == 1


def test_a_failed_request_logs_the_remedy(
    engine: Engine, write: Any, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    folder, v1 = write("task", 111)
    assert ask(engine, PrefixAdapterRequest("task", 1, str(folder))) == [answer(engine, v1)]
    _, v2 = write("task", 112)
    with monkeypatch.context() as patch:
        # As if other prefixes had evicted it.
        for pool in ("_on_device", "_on_host"):
            patch.setattr(engine.writer._manager, pool, LRUPool(0))
        assert engine.llm.reset_prefix_cache()
        assert ask(engine, PrefixAdapterRequest("task")) == [[]]
        assert "offline by a request with `load_inplace=True`. Its requests fail." in log.text
        assert ask(engine, PrefixAdapterRequest("task", load_inplace=True)) == [answer(engine, v2)]


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (
            lambda _: PrefixAdapterRequest("nobody"),
            "give the request the path of the adapter, as `lora_path`, to load it.",
        ),
        (
            lambda _: PrefixAdapterRequest("nobody", load_inplace=True),
            "'nobody' does not exist; this engine has: p1, p7",
        ),
        (lambda _: PrefixAdapterRequest("task", 1, "/nowhere"), "it is neither a folder nor a Hub repository."),
        (lambda folder: PrefixAdapterRequest("a b", 1, folder), "name must be up to 256 letters"),
        (lambda folder: PrefixAdapterRequest("p7", 1, folder), "The prefix adapter 'p7' was loaded from"),
    ],
)
def test_a_refused_load_changes_nothing(
    engine: Engine, write: Any, request_of: Callable[[Path], PrefixAdapterRequest], message: str
) -> None:
    folder, _ = write("task", 113)
    # Its first request reads it.
    ask(engine, PrefixAdapterRequest("p33"))
    before = support.specs_in(config_of(engine).kv_transfer_config)
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
        ask(engine, PrefixAdapterRequest("p33"), request_of(folder))
    assert message in str(caught.value)
    assert support.specs_in(config_of(engine).kv_transfer_config) == before
    assert not engine.llm.llm_engine.has_unfinished_requests()
    engine.check(["p33"], [PROMPT])


def test_a_malformed_adapter_replaces_nothing(engine: Engine, write: Any, tmp_path: Path) -> None:
    folder, v1 = write("task", 114)
    ask(engine, PrefixAdapterRequest("task", 1, str(folder)))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        ask(engine, PrefixAdapterRequest("task", load_inplace=True))
    assert ask(engine, PrefixAdapterRequest("task")) == [answer(engine, v1)]
