"""LoRA, n-gram speculation and priorities, all at once and in one batch with prefixes."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.serving import support
from helpers.serving.engines import Engine
from helpers.serving.on_lora import greedy, train
from helpers.serving.support import prompt_ids
from peft_prefix_ext import read_prefix
from vllm_plugin import PrefixAdapterRequest
from vllm_plugin.adapters import base_lora
from vllm_plugin.errors import PrefixServeError

CONFIG = support.llama_config()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, PeftModel]:
    """Two prefixes on two LoRA adapters, as PEFT saves them: `first/prefix` on `first`, `second` on `second/lora`."""
    model = support.write_model(folder / "model", CONFIG)
    return {
        "first": train(folder / "first", model, 1, lora_first=True),
        "second": train(folder / "second", model, 2, lora_first=False),
    }


def hide_library_from_vllm() -> None:
    """Hides a library of numba from vLLM, which inspects all modules when an engine starts.

    The library returns a function for every attribute, even for `__dict__`, which breaks the start of a second engine.
    """
    from llvmlite.binding import ffi

    library = type(ffi.lib)
    find = library.__getattr__

    def find_but_dict(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return find(self, name)

    library.__getattr__ = find_but_dict


@pytest.fixture(scope="module")
def engine(pool: Any, folder: Path, trained: dict[str, PeftModel]) -> Engine:
    hide_library_from_vllm()
    shutil.copytree(folder / "first", folder / "copy")
    return pool.start(
        CONFIG,
        (7, 32, 33),
        more={
            "first": str(folder / "first" / "prefix"),
            "second": str(folder / "second"),
            "copy": str(folder / "copy" / "prefix"),
        },
        enable_lora=True,
        # One more than there are LoRA adapters: see `base_lora.confuses_slots`.
        max_loras=4,
        max_lora_rank=8,
        max_num_seqs=6,
        scheduling_policy="priority",
        speculative_config={
            **{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
        },
    )


def run(engine: Engine, requests: list[tuple[Any, list[int]]], **params: Any) -> list[list[int]]:
    """Runs one batch of (adapter, prompt) pairs."""
    from vllm import SamplingParams

    sampling = {"temperature": 0.0, "max_tokens": 10, "ignore_eos": True, "detokenize": False, **params}
    outputs = engine.llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in requests],
        SamplingParams(**sampling),
        lora_request=[PrefixAdapterRequest(who) if isinstance(who, str) else who for who, _ in requests],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_base_lora_and_other_lora(engine: Engine, folder: Path, trained: dict[str, PeftModel]) -> None:
    from vllm.lora.request import LoRARequest

    alone = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(engine.model, dtype=torch.float32), folder / "first"
    ).eval()
    lora_alone = LoRARequest("alone", 1, str(folder / "first"))
    prompts = [prompt_ids(count, seed=count) for count in (1, 20, 70)]
    requests, expected = [], []
    for prompt in prompts:
        requests += [(who, prompt) for who in ("first", "second", "p33", None, lora_alone, "copy")]
        expected += [greedy(trained["first"], prompt), greedy(trained["second"], prompt)]
        expected += [engine.reference.greedy(prompt, engine.prefixes["p33"], 10)]
        expected += [engine.reference.greedy(prompt, None, 10), greedy(alone, prompt), greedy(trained["first"], prompt)]
    assert len({tuple(tokens) for tokens in expected}) == 5 * len(prompts)
    for _ in range(2):
        assert run(engine, requests) == expected
    for some in (0, 1, 4):
        assert run(engine, requests[some::6]) == expected[some::6]
    # A prefix and its copy share one LoRA adapter.
    assert engine.llm.llm_engine.list_loras() == {
        1,
        *(base_lora.request_for(spec).lora_int_id for spec in specs(engine)),
    }
    assert len({base_lora.request_for(spec).lora_int_id for spec in specs(engine)}) == 2


def specs(engine: Engine) -> list[Any]:
    found = support.specs_in(engine.llm.llm_engine.vllm_config.kv_transfer_config)
    return [found[name] for name in ("first", "second", "copy")]


def test_prompt_logprobs_beside_lora_on_cpu(engine: Engine) -> None:
    for name in ("first", "p33", None):
        with pytest.raises(ValueError, match="of the prompt are not supported on CPU with --enable-lora"):
            engine.generate([name, name], [prompt_ids(50)] * 2, prompt_logprobs=0)
    engine.check(["p33"], [prompt_ids(5)])


def test_ngram_speculation_changes_no_token(engine: Engine) -> None:
    accepted = []
    original = engine.scheduler.make_spec_decoding_stats

    def observe(*args: Any, **kwargs: Any) -> Any:
        accepted.append(kwargs["num_accepted_tokens"])
        return original(*args, **kwargs)

    engine.scheduler.make_spec_decoding_stats = observe
    # Placeholders repeat the first token, so the best n-gram matches lie among them.
    first, period = prompt_ids(1), prompt_ids(5)
    prompts = [first, first * 9, [*first, *first, *period, *first, *first], period * 6, prompt_ids(70)]
    engine.check(["p33", "p7", "p32", None, "p33"], prompts, max_tokens=30)
    engine.scheduler.make_spec_decoding_stats = original
    assert sum(accepted) > 0
    assert 0 in accepted


def test_ngram_speculation_ends_with_the_context(engine: Engine) -> None:
    rooms = (20, 9, 1)
    prompts = [[5] * (512 - 33 - room) for room in rooms]
    expected = engine.reference.greedy(prompts[0], engine.prefixes["p33"], 20)
    outputs = engine.generate(["p33"] * 3, prompts, max_tokens=100)
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(rooms)
    assert list(outputs[0].outputs[0].token_ids) == expected


def test_priorities(engine: Engine) -> None:
    from vllm import SamplingParams

    llm_engine, names = engine.llm.llm_engine, ["p33", None] * 6
    for index, name in enumerate(names):
        llm_engine.add_request(
            str(index),
            {"type": "token", "prompt_token_ids": prompt_ids(9, seed=index)},
            SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False),
            lora_request=name and PrefixAdapterRequest(name),
            priority=-index,
        )
    llm_engine.step()
    running = {request.request_id.partition("-")[0] for request in engine.scheduler.running}
    assert running == {str(index) for index in range(6, 12)}
    while llm_engine.has_unfinished_requests():
        llm_engine.step()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda config: config.__setattr__("lora_config", None), "start it with --enable-lora, or merge what is below"),
        (
            lambda config: config.lora_config.__setattr__("max_lora_rank", 2),
            "which this server cannot load: LoRA rank 4",
        ),
    ],
)
def test_an_engine_that_cannot_load_the_lora_is_refused(
    engine: Engine, folder: Path, spoil: Callable[[Any], None], message: str
) -> None:
    config = copy.copy(engine.llm.llm_engine.vllm_config)
    config.lora_config = copy.copy(config.lora_config)
    spoil(config)
    with pytest.raises(PrefixServeError, match=r"\A[^\n]*\Z") as caught:
        base_lora.find_base_lora("first", read_prefix(folder / "first" / "prefix"), config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "ab" * 32}, "and it lies in none of"),
        ({"name": "../first", "digest": "ab" * 32}, "and it lies in none of"),
        ({"digest": None}, "whose weights were not recorded"),
        ({"peft_type": "LOHA"}, "the server takes one LoRA adapter below a prefix"),
        (None, "the server takes one LoRA adapter below a prefix"),
    ],
)
def test_a_missing_lora_is_refused(
    engine: Engine, folder: Path, tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    shutil.copytree(folder / "first", tmp_path / "first")
    path = tmp_path / "first" / "prefix" / "adapter_config.json"
    fields = json.loads(path.read_text())
    if change is None:
        fields["base_adapters"].append({**fields["base_adapters"][0], "name": "another"})
    else:
        fields["base_adapters"][0].update(change)
    path.write_text(json.dumps(fields))
    with pytest.raises(PrefixServeError, match=r"\A[^\n]*\Z") as caught:
        base_lora.find_base_lora("first", read_prefix(path.parent), engine.llm.llm_engine.vllm_config)
    assert message in str(caught.value)


class Server:
    """The part of `AsyncLLM` that loads LoRA adapters."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.llm.llm_engine

    async def add_lora(self, request: Any) -> bool:
        return self._engine.add_lora(request)


def test_a_server_loads_lora_when_it_starts(engine: Engine, tmp_path: Path) -> None:
    asyncio.run(base_lora.load(Server(engine), specs(engine)))
    assert {base_lora.request_for(spec).lora_int_id for spec in specs(engine)} <= set(
        engine.llm.llm_engine.list_loras()
    )
    gone = dataclasses.replace(specs(engine)[0], lora_path=str(tmp_path), lora_digest="1" * 64)
    with pytest.raises(PrefixServeError, match="below the prefix adapter 'first', cannot be loaded"):
        asyncio.run(base_lora.load(Server(engine), [gone]))
    plain = dataclasses.replace(gone, lora_path=None, lora_digest=None)
    asyncio.run(base_lora.load(Server(engine), [plain]))


def test_two_loras_of_one_number_are_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = specs(engine)[0]
    monkeypatch.setattr(base_lora, "_digests", {base_lora.request_for(spec).lora_int_id: "another"})
    with pytest.raises(ValueError, match="cannot be told from another one by its number"):
        base_lora.request_for(spec)
