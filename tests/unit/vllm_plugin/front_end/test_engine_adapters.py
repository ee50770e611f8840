"""What a front end without this plugin loads into an engine: prefixes here, LoRA adapters by vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequest

from helpers.serving import support
from vllm_plugin import prefix_adapters
from vllm_plugin.adapters.spec import PrefixSpec, pack, unpack
from vllm_plugin.front_end import engine_adapters
from vllm_plugin.front_end.engine_adapters import EngineAdapters, adapters_of
from vllm_plugin.front_end.requests import has_prefix
from vllm_plugin.kv_transfer_config import ADAPTERS
from vllm_plugin.request_errors import PrefixRequestError

CONFIG = support.llama_config()


def write(folder: Path, seed: int, **overrides: Any) -> str:
    return str(support.write_adapter(folder, CONFIG, support.random_prefix(CONFIG, 4, seed=seed), **overrides))


@pytest.fixture
def vllm_config(model: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    settings = {"model": str(model), "skip_tokenizer_init": True, "max_model_len": 256, "dtype": "float32"}
    return EngineArgs(**settings, **prefix_adapters({})).create_engine_config()


@pytest.fixture
def adapters(vllm_config: Any) -> EngineAdapters:
    return EngineAdapters(vllm_config)


def request(lora: LoRARequest | None, transfer: Any = None, **fields: Any) -> EngineCoreRequest:
    extra_args = None if transfer is None else {"kv_transfer_params": transfer}
    return EngineCoreRequest(
        **{
            "request_id": "a",
            "prompt_token_ids": [5, 6],
            "mm_features": None,
            "pooling_params": None,
            "arrival_time": 0.0,
        },
        sampling_params=SamplingParams(max_tokens=4, extra_args=extra_args),
        **{"lora_request": lora, "cache_salt": None, "data_parallel_rank": None, **fields},
    )


def load(adapters: EngineAdapters, lora: LoRARequest) -> LoRARequest:
    future = adapters.load(lora)
    assert future is not None
    assert future.result() is True
    return lora


def digest(adapters: EngineAdapters, lora: LoRARequest) -> str:
    adapters.prepare(sent := request(lora))
    assert sent.lora_request is None
    return unpack(sent.sampling_params.extra_args["kv_transfer_params"][ADAPTERS]).digest


def test_an_engine_has_one_table(vllm_config: Any) -> None:
    engine = SimpleNamespace(vllm_config=vllm_config)
    assert adapters_of(engine) is adapters_of(engine)


def test_lora_adapters_are_those_of_vllm(
    adapters: EngineAdapters, vllm_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_config, "lora_config", SimpleNamespace())
    one, lora = write(tmp_path / "one", 1), write(tmp_path / "lora", 1, peft_type="LORA")
    prefix, other = load(adapters, LoRARequest("one", 1, one)), LoRARequest("one", 1, lora, load_inplace=True)
    expected = digest(adapters, prefix)
    # A LoRA adapter may take the place of a prefix, and a prefix that of a LoRA adapter.
    assert adapters.load(other) is None
    adapters.prepare(sent := request(other))
    assert (sent.lora_request, has_prefix(sent)) == (other, False)
    # One that was on its way.
    assert digest(adapters, prefix) == expected
    assert not adapters.unload(1)
    assert digest(adapters, load(adapters, prefix)) == expected
    adapters.prepare(sent := request(other))
    assert not has_prefix(sent)
    assert adapters.unload(1)
    # A prefix that was never loaded would be loaded as a LoRA adapter.
    with pytest.raises(PrefixRequestError, match="'two' is not loaded in this engine; load it again"):
        adapters.prepare(request(LoRARequest("two", 2, one)))


def test_without_lora_every_adapter_is_a_prefix(adapters: EngineAdapters, tmp_path: Path) -> None:
    lora = LoRARequest("lora", 1, write(tmp_path / "lora", 1, peft_type="LORA"))
    future = adapters.load(lora)
    assert future is not None
    with pytest.raises(PrefixRequestError, match="not a prefix"):
        future.result()
    with pytest.raises(PrefixRequestError, match="'lora' is not loaded in this engine"):
        adapters.prepare(request(lora))


def test_a_prefix_on_lora_needs_python(
    adapters: EngineAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "vllm_plugin.adapters.loading.find_base_lora", lambda *_: {"lora_path": "/l", "lora_digest": "1"}
    )
    future = adapters.load(LoRARequest("one", 1, write(tmp_path / "one", 1)))
    assert future is not None
    with pytest.raises(PrefixRequestError, match=r"'one' was trained on a LoRA adapter.*unset VLLM_USE_RUST_FRONTEND"):
        future.result()
    # Its name is free.
    monkeypatch.undo()
    load(adapters, LoRARequest("one", 2, write(tmp_path / "two", 2)))


def test_requests_of_pythons_front_end_pass(adapters: EngineAdapters, tmp_path: Path) -> None:
    packed = pack(PrefixSpec("gone", "/gone", "/gone", 4, "digest"))
    lora = LoRARequest("prefix-adapter-lora:1", 1 << 30, "/lora")
    adapters.prepare(sent := request(lora, {ADAPTERS: packed}))
    assert sent == request(lora, {ADAPTERS: packed})
    # Refused by a front end already, whatever it says.
    adapters.prepare(request(None, {ADAPTERS: "x"}, abort_immediately=True))
    for forged in ("x", ["x"], None, {"name": "x"}):
        with pytest.raises(PrefixRequestError, match="may not hold 'prefix_adapters'"):
            adapters.prepare(request(None, {ADAPTERS: forged}))


def test_a_bounded_number_of_unloaded_adapters_is_kept(
    adapters: EngineAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_adapters, "MAX_UNLOADED", 2)
    folder = write(tmp_path / "one", 1)
    loras = [load(adapters, LoRARequest(f"n{number}", number, folder)) for number in (1, 2, 3)]
    assert all(adapters.unload(number) for number in (1, 2, 3))
    assert not adapters.unload(3)
    with pytest.raises(PrefixRequestError, match="'n1' is not loaded"):
        adapters.prepare(request(loras[0]))
    assert len({digest(adapters, lora) for lora in loras[1:]}) == 1


def test_an_engine_on_another_machine_leaves_adapters_to_vllm(
    adapters: EngineAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_folder(_: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("vllm_plugin.adapters.runtime_loading.registry_in", no_folder)
    assert adapters.load(LoRARequest("one", 1, write(tmp_path / "one", 1))) is None
