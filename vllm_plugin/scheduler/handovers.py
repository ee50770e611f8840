"""Which requests take over the blocks of the server that prefilled them. The others run here, wholly.

vLLM's NixlConnector takes each request at its word. It waits for blocks that nobody told it the place of, or ends the
engine. And it reads blocks that are free again, which may hold the text of anybody by then: the other server frees them as
soon as one request has read them, and knows nothing of a second one.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from vllm_plugin.adapters import handover
from vllm_plugin.logger import logger

if TYPE_CHECKING:
    from vllm.v1.request import Request

# What the connector looks up without a check.
NEEDED = ("remote_block_ids", "remote_engine_id", "remote_request_id", "remote_host", "remote_port")
# How many requests of other servers are remembered, so that no other request here reads their blocks.
MAX_TAKEN_OVER = 65536


class Handovers:
    """The handovers of one engine."""

    def __init__(self) -> None:
        # The oldest first.
        self._taken_over: OrderedDict[tuple[str, str], None] = OrderedDict()

    def check(self, request: Request) -> None:
        """Lets a new request run here if it cannot take over the blocks that it names.

        So does it with a request that the front end has refused, whose parameters reach the connector as well, to free the
        blocks there.
        """
        transfer = request.kv_transfer_params
        if not transfer:
            return
        if not handover.is_handed_over(transfer):
            if transfer.get("remote_block_ids"):
                # Only "bidirectional_kv_xfer" would read them.
                request.kv_transfer_params = {**transfer, "remote_block_ids": None}
            return
        lacking = [name for name in NEEDED if not transfer.get(name)]
        if not lacking and self._is_first(str(transfer["remote_engine_id"]), str(transfer["remote_request_id"])):
            return
        logger.warning(
            "Request %s runs here, and takes over no blocks of another server: %s.",
            request.request_id,
            f"its `kv_transfer_params` lack {', '.join(lacking)}" if lacking else "an earlier request has done so",
        )
        # Its own: in an engine of the front end's process, the choices of a request share one.
        request.kv_transfer_params = {**transfer, "do_remote_prefill": False}

    def _is_first(self, engine_id: str, request_id: str) -> bool:
        key = engine_id, request_id
        if key in self._taken_over:
            return False
        self._taken_over[key] = None
        if len(self._taken_over) > MAX_TAKEN_OVER:
            self._taken_over.popitem(last=False)
        return True
