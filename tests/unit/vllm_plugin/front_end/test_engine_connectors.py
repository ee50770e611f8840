"""The operator's own KV connector beside prefixes, in the config of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.serving import support
from helpers.serving.configs import engine_config, refused
from vllm_plugin.adapters.validation import check_engine
from vllm_plugin.errors import PrefixServeError


@pytest.mark.parametrize(
    ("connector", "extra", "is_refused"),
    [
        ("SimpleCPUOffloadConnector", {}, True),
        ("OffloadingConnector", {"self_describing_kv_events": True}, True),
        ("OffloadingConnector", {}, False),
    ],
)
def test_connectors_that_publish_placeholders_are_refused(
    model: Path, adapter: Path, connector: str, extra: dict[str, Any], is_refused: bool
) -> None:
    from vllm.config import KVEventsConfig

    extra = {"cpu_bytes_to_use": 1 << 20, **extra}
    theirs = {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    engine_config(model, adapter, kv_transfer_config=theirs)
    settings = {"kv_transfer_config": theirs, "kv_events_config": KVEventsConfig(enable_kv_cache_events=True)}
    if is_refused:
        refused(model, adapter, f"{connector} would publish the placeholders of prefixes as text", **settings)
    else:
        engine_config(model, adapter, **settings)


def test_another_connector_runs_after_ours(model: Path, adapter: Path) -> None:
    theirs = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 20},
    }
    merged = engine_config(model, adapter, kv_transfer_config=theirs).kv_transfer_config
    children = merged.kv_connector_extra_config["connectors"]
    assert [child["kv_connector"] for child in children] == ["PrefixConnector", "OffloadingConnector"]
    assert merged.kv_load_failure_policy == "fail"
    assert support.specs_in(merged)["one"].num_virtual_tokens == 4


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("is_hybrid", True, "do not support recurrent layers with the NixlConnector"),
        ("num_prefill_lookahead_tokens", 2, "do not support several MTP modules with the NixlConnector"),
    ],
)
def test_prompts_that_are_not_prefilled_to_their_end(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, attribute: str, value: Any, message: str
) -> None:
    # vLLM sets it for the NixlConnector on CPUs, and it would stay for later tests.
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", "SD")
    nixl = {"kv_connector": "NixlConnector", "kv_role": "kv_producer"}
    configs = [engine_config(model, adapter, kv_transfer_config=other) for other in (None, nixl)]
    owner = configs[0] if hasattr(configs[0], attribute) else configs[0].model_config
    monkeypatch.setattr(type(owner), attribute, value)
    check_engine(configs[0])
    with pytest.raises(PrefixServeError, match=message):
        check_engine(configs[1])


def test_settings_of_several_connectors_are_kept(model: Path, adapter: Path) -> None:
    extra = {"connectors": [], "mine": 1}
    theirs = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    merged = engine_config(model, adapter, kv_transfer_config=theirs).kv_transfer_config
    assert merged.kv_connector_extra_config["mine"] == 1
    assert support.specs_in(merged).keys() == {"one"}
