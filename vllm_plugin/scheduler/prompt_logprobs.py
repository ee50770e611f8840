"""Prompt log-probabilities of a request with a prefix: only the rows of real tokens.

Such a request runs every real token, so it skips the prefix cache but still loads its prefix
(`PrefixScheduler.accept_load`). Its worker returns rows by position: model runner V1 a row per position, those of
virtual tokens uninitialized; model runner V2 only the rows it computed. Either way the last L - 1 rows belong to the L
real tokens. The first real token has none, as in vLLM without a prefix.

The rows are cut before they leave the engine, so any front end gets those of the client's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_plugin.adapters.spec import unpack
from vllm_plugin.kv_transfer_config import ADAPTERS

if TYPE_CHECKING:
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.request import Request


def keep_real_rows(requests: Mapping[str, Request], tensors: dict[str, LogprobsTensors | None]) -> None:
    """Removes the rows of virtual tokens from what the workers return of one step.

    Args:
        requests: The scheduler's requests by their ids.
        tensors: The prompt log-probabilities by the same ids; changed in place.
    """
    for request_id, rows in tensors.items():
        request = requests.get(request_id)
        packed = None if request is None else (request.kv_transfer_params or {}).get(ADAPTERS)
        if rows is not None and request is not None and packed is not None:
            tensors[request_id] = _last(rows, request.num_prompt_tokens - unpack(packed).num_virtual_tokens - 1)


def _last(rows: LogprobsTensors, num_rows: int) -> LogprobsTensors:
    """Returns the last rows: `[num_rows, num_prompt_logprobs + 1]`, and their ranks, `[num_rows]`."""
    first = len(rows.logprobs) - num_rows
    return rows._replace(
        logprob_token_ids=rows.logprob_token_ids[first:],
        logprobs=rows.logprobs[first:],
        selected_token_ranks=rows.selected_token_ranks[first:],
    )
