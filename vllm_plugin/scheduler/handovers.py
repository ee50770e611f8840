"""Which requests take over the blocks of the server that prefilled them. The others run here, wholly.

vLLM's NixlConnector takes each request at its word. It waits for blocks that nobody told it the place of, or ends the
engine. And it reads blocks that are free again, which may hold the text of anybody by then: the other server frees them as
soon as one request has read them, and knows nothing of a second one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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

    def check(self, request: Request, num_tokens: int) -> None:
        """Lets a new request run here if it cannot take over the blocks that it names.

        So does it with a request that the front end has refused, whose parameters reach the connector as well, to free the
        blocks there.

        Args:
            request: The request.
            num_tokens: The tokens of its prompt, virtual ones included.
        """
        transfer = request.kv_transfer_params
        if not transfer:
            return
        if not handover.is_handed_over(transfer):
            if transfer.get("remote_block_ids"):
                # Only "bidirectional_kv_xfer" would read them.
                request.kv_transfer_params = {**transfer, "remote_block_ids": None}
            return
        problem = self._problem(transfer, num_tokens)
        if problem is None:
            return
        logger.warning(
            "Request %s runs here, and takes over no blocks of another server: %s.", request.request_id, problem
        )
        # Its own: in an engine of the front end's process, the choices of a request share one.
        request.kv_transfer_params = {**transfer, "do_remote_prefill": False}

    def _problem(self, transfer: Mapping[str, Any], num_tokens: int) -> str | None:
        if lacking := [name for name in NEEDED if not transfer.get(name)]:
            return f"its `kv_transfer_params` lack {', '.join(lacking)}"
        # Of another prompt of the same request, say: a response has the parameters of one only.
        prefilled = transfer.get("remote_num_tokens")
        if isinstance(prefilled, int) and 0 < prefilled < num_tokens:
            return f"they are of a prompt of {prefilled} tokens, and this one has {num_tokens}"
        if not self._is_first(str(transfer["remote_engine_id"]), str(transfer["remote_request_id"])):
            return "an earlier request has done so"
        return None

    def _is_first(self, engine_id: str, request_id: str) -> bool:
        key = engine_id, request_id
        if key in self._taken_over:
            return False
        self._taken_over[key] = None
        if len(self._taken_over) > MAX_TAKEN_OVER:
            self._taken_over.popitem(last=False)
        return True
