"""Prompt log-probabilities of a request with a prefix: only the rows of real tokens.

Such a request runs every real token, so it skips the prefix cache but still loads its prefix
(`PrefixScheduler.accept_load`). Its worker returns rows by position: model runner V1 a row per position, those of
virtual tokens uninitialized; model runner V2 only the rows it computed. Either way the last L - 1 rows belong to the L
real tokens. The first real token has none, as in vLLM without a prefix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_plugin.front_end.requests import has_prefix

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsTensors

_NUM_ROWS = "num_real_prompt_rows"


def expect(processor: LogprobsProcessor | None, request: EngineCoreRequest) -> None:
    """Records how many rows of prompt log-probabilities belong to real tokens, if the request has a prefix."""
    if processor is not None and processor.prompt_logprobs is not None and has_prefix(request):
        setattr(processor, _NUM_ROWS, len(request.prompt_token_ids or ()) - 1)


def real_rows(processor: LogprobsProcessor, tensors: LogprobsTensors) -> LogprobsTensors:
    """Returns the rows of real tokens: `[L - 1, num_prompt_logprobs + 1]`, and the ranks, `[L - 1]`."""
    num_rows = getattr(processor, _NUM_ROWS, None)
    if num_rows is None:
        return tensors
    first = len(tensors.logprobs) - num_rows
    return tensors._replace(
        logprob_token_ids=tensors.logprob_token_ids[first:],
        logprobs=tensors.logprobs[first:],
        selected_token_ranks=tensors.selected_token_ranks[first:],
    )
