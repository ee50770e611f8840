"""Disaggregated prefill: both servers must use the same prefix for a request.

The server that decodes takes over the blocks of the one that prefilled, whatever these blocks hold. The placeholders are
in them on both sides, so the counts of tokens and blocks agree if the prefix is the same, and else nothing is right. So
the response of the server that prefilled says in its KV transfer parameters which prefix it used. Routers pass these on
as they are. A response without a prefix says nothing, as that of a server without the plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_plugin.adapters.spec import PrefixSpec

CONTENT = "prefix_adapter_content"


def say(spec: PrefixSpec) -> dict[str, str]:
    """Returns what the server that prefills says of a prefix, for the KV transfer parameters of its response."""
    return {CONTENT: _content(spec)}


def is_handed_over(transfer: Mapping[str, Any]) -> bool:
    """Returns whether a request shall take over blocks of another server."""
    return bool(transfer.get("do_remote_prefill"))


def problem(spec: PrefixSpec | None, transfer: Mapping[str, Any]) -> str | None:
    """Returns why a request cannot take over blocks of another server; None if it can, or does not ask for it.

    Args:
        spec: Its prefix here; None for a request of the base model.
        transfer: The KV transfer parameters of the request.
    """
    if not is_handed_over(transfer):
        return None
    there, here = transfer.get(CONTENT), None if spec is None else _content(spec)
    if there == here:
        return None
    if spec is None:
        return "The server that prefilled this request used a prefix adapter, and this one does not; send both the same `model`."
    if there is None:
        return (
            f"The server that prefilled this request did not use the prefix adapter {spec.name!r}; send both the same `model`, "
            "and pass on all of its `kv_transfer_params`."
        )
    return (
        f"The server that prefilled this request has another prefix adapter of the name {spec.name!r}; load the same one on "
        "both servers."
    )


def _content(spec: PrefixSpec) -> str:
    """Names all that the K/V behind a prefix depend on, except for the model."""
    return f"{spec.content}+{spec.lora_digest}" if spec.lora_digest else spec.content
