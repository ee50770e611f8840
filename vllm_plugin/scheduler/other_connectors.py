"""What the connectors beside ours keep of requests whose prefix was not there: vLLM's own offload blocks by their hashes.

They cannot forget single blocks, so they forget all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger("vllm.prefix_adapters")


class OtherConnectors:
    """Empties the caches of other connectors after a load failed.

    Twice: at once, which also drops what they are about to keep, and when they have been told of the requests that
    failed, since they keep what is left of a request when it has ended.
    """

    def __init__(self) -> None:
        self._connectors: Sequence[Any] = ()
        self._scheduled = False

    def load_failed(self, connectors: Sequence[Any]) -> None:
        """Empties the caches of `connectors`, now and once more after the next step is scheduled."""
        if connectors:
            logger.warning(
                "A prefix was not loaded: what other KV connectors keep is dropped, since some of it is wrong."
            )
        self._connectors = connectors
        self._reset()

    def next_step(self) -> None:
        """Notes that a step is scheduled: they take no second reset before that."""
        self._scheduled = True

    def were_reset(self) -> None:
        """Notes that vLLM has emptied all caches, on somebody's request."""
        self._scheduled = False

    def update(self) -> None:
        """Does what is still to be done, before they hear what the workers have done."""
        if self._connectors and self._reset():
            self._connectors = ()

    def _reset(self) -> bool:
        if not self._scheduled:
            return False
        self._scheduled = False
        # Some say False while a copy runs.
        done = [connector.reset_cache() is not False for connector in self._connectors]
        return all(done)
