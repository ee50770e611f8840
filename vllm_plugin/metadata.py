"""What the scheduler tells the workers in each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from vllm_plugin.adapters.spec import PrefixSpec

# vLLM's block id where a request has no block: for tokens that have left a sliding window, and states that are not kept.
NULL_BLOCK = 0


@dataclass(frozen=True, slots=True)
class PrefixLoad:
    """One copy of the virtual tokens `start..stop-1` of a prefix into a request's blocks.

    Args:
        spec: The prefix.
        start: First virtual token to copy; those before it are cached already.
        stop: One past the last, p.
        block_ids: The request's block ids per KV cache group, from position 0.
    """

    spec: PrefixSpec
    start: int
    stop: int
    block_ids: tuple[list[int], ...]


@dataclass
class PrefixMetadata(KVConnectorMetadata):
    """The loads of one step.

    Args:
        loads: The loads.
        pinned: The digests of all pinned prefixes, with loads, if they have changed.
    """

    loads: list[PrefixLoad] = field(default_factory=list)
    pinned: frozenset[str] | None = None
