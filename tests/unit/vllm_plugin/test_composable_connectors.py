"""Which KV connectors of the operator run beside prefixes, and the reason why others do not."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.config import KVTransferConfig

from vllm_plugin.composable_connectors import COMPOSABLE
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.kv_transfer_config import HANDOVER, merge, settings, settings_in


def connector(name: str, **fields: Any) -> dict[str, Any]:
    return {"kv_connector": name, "kv_role": "kv_both", **fields}


def several(*children: dict[str, Any]) -> dict[str, Any]:
    return connector("MultiConnector", kv_connector_extra_config={"connectors": list(children)})


@pytest.mark.parametrize("name", COMPOSABLE)
@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer", "kv_both"])
def test_a_connector_runs_after_ours(name: str, role: str) -> None:
    extra = {"mine": 1}
    theirs = connector(name, kv_role=role, engine_id="engine", kv_connector_extra_config=extra)
    merged = merge(theirs, settings([]))
    ours, child = merged.kv_connector_extra_config["connectors"]
    assert (ours["kv_connector"], child["kv_connector"]) == ("PrefixConnector", name)
    # Its own role and settings stay; the server can do what either can.
    assert (child["kv_role"], child["kv_connector_extra_config"]) == (role, extra)
    assert merged.kv_role == ("kv_consumer" if role == "kv_consumer" else "kv_both")
    # The other server knows this one by its id, which vLLM hands to each connector.
    assert (merged.engine_id, "engine_id" in child) == ("engine", False)
    hands_over = name.startswith("Nixl")
    assert settings_in(merged).get(HANDOVER, False) is hands_over
    assert settings_in(merge(several(connector(name)), settings([]))).get(HANDOVER, False) is hands_over


def test_a_whole_prompt_is_taken_over_before_a_part_of_it_is_loaded() -> None:
    theirs = several(
        connector("OffloadingConnector"), connector("NixlConnector"), connector("SimpleCPUOffloadConnector")
    )
    merged = merge(theirs, settings([]))
    names = [child["kv_connector"] for child in merged.kv_connector_extra_config["connectors"]]
    assert names == ["PrefixConnector", "NixlConnector", "OffloadingConnector", "SimpleCPUOffloadConnector"]
    assert theirs["kv_connector_extra_config"]["connectors"][0]["kv_connector"] == "OffloadingConnector"


def test_settings_of_the_caller_stay_as_they_are() -> None:
    given = settings([])
    merge(connector("NixlConnector"), given)
    assert given == settings([])


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (connector("LMCacheConnectorV1"), "it finds blocks by token ids"),
        (connector("HF3FSKVConnector"), "it finds blocks by token ids"),
        (connector("ExampleConnector"), "it finds blocks by token ids"),
        (connector("LMCacheMPConnector"), "also blocks that ran without a prefix that could not be read"),
        (connector("NixlPushConnector"), "cannot tell which prefix the one that prefills has used"),
        (connector("MooncakeConnector"), "was never checked"),
        # Somebody else's code by a known name.
        (connector("NixlConnector", kv_connector_module_path="mine"), "was never checked"),
        (connector("NixlConnector", kv_connector_extra_config={"bidirectional_kv_xfer": True}), "leave it out"),
    ],
)
def test_a_refusal_says_why(theirs: dict[str, Any], reason: str) -> None:
    for each in (theirs, KVTransferConfig(**theirs), several(connector("OffloadingConnector"), theirs)):
        with pytest.raises(PrefixServeError, match=r"\A[^\n]*\Z") as caught:
            merge(each, settings([]))
        assert reason in str(caught.value)
        assert theirs["kv_connector"] in str(caught.value)


def test_connectors_of_lmcache_are_as_they_were_read() -> None:
    """What the refusals say holds for the connectors that vLLM brings; if not, they could be served."""
    from pathlib import Path

    import vllm.distributed.kv_transfer.kv_connector.v1 as connectors

    folder = Path(connectors.__file__).parent
    # LMCache itself is not needed to read them.
    in_process = (folder / "lmcache_integration" / "vllm_v1_adapter.py").read_text(encoding="utf-8")
    assert "salt" not in in_process
    assert "block_hash" not in in_process
    of_server = (folder / "lmcache_mp_connector.py").read_text(encoding="utf-8")
    assert "cache_salt" in of_server
    assert "def reset_cache" not in of_server
