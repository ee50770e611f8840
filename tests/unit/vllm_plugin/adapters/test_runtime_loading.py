"""Offline requests: a `LoRARequest` of a prefix, an adapter that is found by its name, one that is removed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from helpers.serving import support
from vllm_plugin import PrefixAdapterRequest, prefix_adapters, remove_prefix_adapter
from vllm_plugin.adapters.adapter_kinds import check_lora
from vllm_plugin.adapters.runtime_loading import adapter_of, as_prefix_request, load_requested
from vllm_plugin.errors import PrefixServeError

CONFIG = support.llama_config()


def write(folder: Path, seed: int, **overrides: Any) -> str:
    return str(support.write_adapter(folder, CONFIG, support.random_prefix(CONFIG, 4, seed=seed), **overrides))


def config_of(model: Path, *args: Any, **sources: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    settings = {"model": str(model), "skip_tokenizer_init": True, "max_model_len": 256, "dtype": "float32"}
    return EngineArgs(**settings, **prefix_adapters(*args, **sources)).create_engine_config()


def test_a_lora_request_of_a_prefix_is_one_for_the_prefix(model: Path, tmp_path: Path) -> None:
    config = config_of(model, {})
    one, lora = write(tmp_path / "one", 1), write(tmp_path / "lora", 1, peft_type="LORA")
    requests = [LoRARequest("one", 1, one), LoRARequest("lora", 2, lora), None, LoRARequest("hub", 3, "me/lora")]
    found = load_requested(requests, config)
    assert found[1:] == requests[1:]
    assert found[0].spec == support.specs_in(config.kv_transfer_config)["one"]
    # By its name from then on, and by the same path, also when the folder is gone.
    (tmp_path / "one").rename(tmp_path / "gone")
    again = as_prefix_request(LoRARequest("one", 1, one), config)
    assert adapter_of(again, config) == adapter_of(PrefixAdapterRequest("one"), config) == found[0].spec
    two = write(tmp_path / "two", 2)
    with pytest.raises(ValueError, match="set `load_inplace=True` to replace it"):
        load_requested([LoRARequest("one", 1, two)], config)
    (replaced,) = load_requested([LoRARequest("one", 1, two, load_inplace=True)], config)
    assert replaced.spec.digest != found[0].spec.digest


def test_a_folder_that_becomes_a_prefix(model: Path, tmp_path: Path) -> None:
    config, request = config_of(model, {}), LoRARequest("one", 1, str(tmp_path / "one"))
    assert as_prefix_request(request, config) is request
    write(tmp_path / "one", 1)
    assert isinstance(as_prefix_request(request, config), PrefixAdapterRequest)
    for path in ("~nobody-here/x", "a\0b", "s3://x/y", "x" * 5000):
        request = LoRARequest("two", 1, path)
        assert as_prefix_request(request, config) is request


def test_an_engine_without_prefixes_refuses_one_that_is_given_as_a_lora(tmp_path: Path) -> None:
    request = LoRARequest("mine", 1, write(tmp_path / "one", 1))
    assert as_prefix_request(request, SimpleNamespace(kv_transfer_config=None)) is request
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
            check_lora(request)
        assert "holds a prefix, not a LoRA; start with `LLM(..., **prefix_adapters({'mine': path}))`" in str(
            caught.value
        )
    check_lora(LoRARequest("mine", 1, "/lora"))


def test_path_is_another_name_of_lora_path(model: Path, tmp_path: Path) -> None:
    config, one = config_of(model, {}), write(tmp_path / "one", 1)
    request = PrefixAdapterRequest("one", path=one, load_inplace=True)
    assert (request.path, request.lora_path) == (one, one)
    assert PrefixAdapterRequest("one", 1, one).path == one
    assert adapter_of(request, config).source == one


def test_adapters_are_read_with_their_first_request(model: Path, tmp_path: Path) -> None:
    config = config_of(model, one=write(tmp_path / "one", 1))
    assert support.specs_in(config.kv_transfer_config)["one"].digest == ""
    (request,) = load_requested([PrefixAdapterRequest("one")], config)
    assert request.spec.digest
    other = config_of(model, one=write(tmp_path / "other", 2))
    # As `LoRARequest`s name adapters.
    assert adapter_of(PrefixAdapterRequest("one", 1, str(tmp_path / "other")), other).digest


def test_an_adapter_is_found_by_its_name(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "root" / "one", 1)
    config = config_of(model, prefix_adapter_dir=tmp_path / "root")
    assert adapter_of(PrefixAdapterRequest("one"), config).source == str(tmp_path / "root" / "one")
    with pytest.raises(ValueError, match="'two' does not exist; this engine has: one"):
        adapter_of(PrefixAdapterRequest("two"), config)


def test_pinned_adapters_stay_so_when_they_are_read_found_and_replaced(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "root" / "found", 3)
    write(tmp_path / "root" / "other", 4)
    config = config_of(
        model,
        one={"path": write(tmp_path / "one", 1), "pinned": True},
        prefix_adapter_dir=tmp_path / "root",
        prefix_adapter_pinned=["found", "brought"],
    )
    brought = PrefixAdapterRequest("brought", path=write(tmp_path / "brought", 5))
    requests = [*map(PrefixAdapterRequest, ("one", "found", "other")), brought]
    assert [adapter_of(request, config).pinned for request in requests] == [True, True, False, True]
    newer = PrefixAdapterRequest("one", path=write(tmp_path / "newer", 2), load_inplace=True)
    before = adapter_of(PrefixAdapterRequest("one"), config)
    assert adapter_of(newer, config).pinned
    assert adapter_of(PrefixAdapterRequest("one"), config).digest != before.digest
    # Their blocks are those of the same adapter without a pin.
    assert before.salt(None) == dataclasses.replace(before, pinned=False).salt(None)


def test_an_adapter_is_removed(model: Path, tmp_path: Path) -> None:
    class Engine:
        vllm_config = config_of(model, one=write(tmp_path / "one", 1))

    remove_prefix_adapter(Engine, "one")
    assert support.specs_in(Engine.vllm_config.kv_transfer_config) == {}
    with pytest.raises(PrefixServeError, match="'one' cannot be removed; this engine has: none"):
        remove_prefix_adapter(Engine, "one")


def test_another_engine_of_the_server_may_be_faster(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_plugin.adapters import runtime_loading
    from vllm_plugin.adapters.registry import Registry

    config = config_of(model, {})
    opened = []

    def open_twice(option: Any, config: Any, registry: Any) -> Any:
        adapter = open_adapter(option, config, registry)
        opened.append(adapter)
        Registry(registry.folder).add([adapter])
        return adapter

    open_adapter = runtime_loading.open_adapter
    monkeypatch.setattr(runtime_loading, "open_adapter", open_twice)
    one = write(tmp_path / "one", 1)
    assert adapter_of(PrefixAdapterRequest("one", lora_path=one), config) == opened[0].spec
    assert len(opened) == 1
