"""Log-probabilities of a prompt behind a prefix: rows of real tokens only.

Such a request has to run every real token, so it reads no blocks of real tokens from the cache, and still takes its
prefix from the connector (`PrefixScheduler.num_loadable`). Its worker returns rows by position. Model runner V1 fills a
table of all positions, and nothing ever wrote those of virtual tokens; model runner V2 returns the rows it computed.
Either way the last L - 1 are those of the L real tokens, of which the first has none, as in vLLM without a prefix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_plugin.front_end.requests import has_prefix

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsTensors

_ROWS = "num_real_prompt_rows"


def expect(processor: LogprobsProcessor, request: EngineCoreRequest) -> None:
    """Notes how many rows of prompt log-probabilities belong to real tokens, if the request runs with a prefix."""
    if processor.prompt_logprobs is not None and has_prefix(request):
        setattr(processor, _ROWS, len(request.prompt_token_ids or ()) - 1)


def real_rows(processor: LogprobsProcessor, tensors: LogprobsTensors) -> LogprobsTensors:
    """Returns the rows of real tokens: `[L - 1, num_prompt_logprobs + 1]`, and the ranks, `[L - 1]`."""
    rows = getattr(processor, _ROWS, None)
    if rows is None:
        return tensors
    first = len(tensors.logprobs) - rows
    return tensors._replace(
        logprob_token_ids=tensors.logprob_token_ids[first:],
        logprobs=tensors.logprobs[first:],
        selected_token_ranks=tensors.selected_token_ranks[first:],
    )
