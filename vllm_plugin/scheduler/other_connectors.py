"""Other connectors must forget the blocks of requests whose prefix was missing.

vLLM's own connectors store blocks by their hashes. They cannot forget single blocks, so they forget all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from vllm_plugin.logger import logger


def keeps_blocks(connector: Any) -> bool:
    """Returns whether a connector keeps blocks that it can forget; others hand them over and keep none."""
    return type(connector).reset_cache is not KVConnectorBase_V1.reset_cache


class OtherConnectors:
    """Empties the caches of other connectors after a failed load.

    It does so twice: at once, which also cancels pending stores, and again when the connectors have been told of the
    failed requests, since they store the remaining blocks of a request when it ends.
    """

    def __init__(self) -> None:
        self._connectors: Sequence[Any] = ()
        self._scheduled = False

    def load_failed(self, connectors: Sequence[Any]) -> None:
        """Empties the caches of `connectors`, now and once more after the next step is scheduled."""
        if connectors:
            logger.warning(
                "A prefix was not loaded. The caches of other KV connectors are emptied: some blocks are wrong."
            )
        self._connectors = connectors
        self._reset()

    def next_step(self) -> None:
        """Records that a step is scheduled; connectors do not support a second reset before that."""
        self._scheduled = True

    def were_reset(self) -> None:
        """Records that vLLM has emptied all caches, for another reason."""
        self._scheduled = False

    def update(self) -> None:
        """Runs the second reset if it is due. Call it before the connectors receive the workers' output."""
        if self._connectors and self._reset():
            self._connectors = ()

    def _reset(self) -> bool:
        if not self._scheduled:
            return False
        self._scheduled = False
        # A connector may return False while it copies.
        done = [connector.reset_cache() is not False for connector in self._connectors]
        return all(done)
