"""Which KV connectors run beside ours, and why others do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_plugin.errors import PrefixServeError

# They keep blocks by vLLM's salted block hashes, and forget all of them when they are told to.
KEEPS_BLOCKS = ("OffloadingConnector", "SimpleCPUOffloadConnector")
# They take over the blocks of one request from the server that prefilled it, by the ids of the request and its blocks.
# Two names of one class.
TAKES_OVER = ("NixlConnector", "NixlPullConnector")
COMPOSABLE = (*KEEPS_BLOCKS, *TAKES_OVER)

_KEYS_BY_TOKENS = "it finds blocks by token ids, and the placeholders of two prefixes have the same ones"
_REASONS = {
    "ExampleConnector": _KEYS_BY_TOKENS,
    "HF3FSKVConnector": _KEYS_BY_TOKENS,
    "LMCacheConnectorV1": _KEYS_BY_TOKENS,
    # It sends the salt along. But it has no `reset_cache`, and servers share what it keeps.
    "LMCacheMPConnector": "it keeps what it was given, also blocks that ran without a prefix that could not be read",
    # The server that decodes may be asked before the other one has answered.
    "NixlPushConnector": "with it, the server that decodes cannot tell which prefix the one that prefills has used",
}
_UNKNOWN = "how it tells the blocks of two prefixes apart was never checked"


def check_composable(connectors: Iterable[Mapping[str, Any]]) -> None:
    """Checks the operator's own connectors, each of them the fields of a `KVTransferConfig`.

    Raises:
        PrefixServeError: If one of them cannot run beside prefixes.
    """
    for connector in connectors:
        name = connector.get("kv_connector")
        is_own = bool(connector.get("kv_connector_module_path"))
        if is_own or name not in COMPOSABLE:
            reason = _UNKNOWN if is_own else _REASONS.get(str(name), _UNKNOWN)
            raise PrefixServeError(
                f"Prefix adapters cannot run beside the KV connector {name!r}: {reason}; use {', '.join(COMPOSABLE)}, or none."
            )
        extra = connector.get("kv_connector_extra_config") or {}
        if name in TAKES_OVER and extra.get("bidirectional_kv_xfer"):
            raise PrefixServeError(
                f'Prefix adapters do not support "bidirectional_kv_xfer" of the {name} yet; leave it out.'
            )


def takes_over(connector: Mapping[str, Any]) -> bool:
    """Returns whether a connector takes over what another server has prefilled."""
    return connector.get("kv_connector") in TAKES_OVER
