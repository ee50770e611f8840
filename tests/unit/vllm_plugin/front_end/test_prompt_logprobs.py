"""The rows of prompt log-probabilities that belong to real tokens, for both model runners."""

from __future__ import annotations

import types

import pytest
import torch
from vllm.v1.outputs import LogprobsTensors

from vllm_plugin.front_end.prompt_logprobs import expect, real_rows
from vllm_plugin.kv_transfer_config import ADAPTERS


def table(num_rows: int) -> LogprobsTensors:
    values = torch.arange(num_rows)
    return LogprobsTensors(values[:, None].repeat(1, 2), values[:, None].repeat(1, 2).float(), values)


@pytest.mark.parametrize("num_tokens", [1, 2, 70])
@pytest.mark.parametrize("num_virtual_tokens", [1, 33])
def test_the_last_rows_are_those_of_real_tokens(num_tokens: int, num_virtual_tokens: int) -> None:
    params = types.SimpleNamespace(extra_args={"kv_transfer_params": {ADAPTERS: {}}})
    request = types.SimpleNamespace(sampling_params=params, prompt_token_ids=[7] * num_tokens)
    processor = types.SimpleNamespace(prompt_logprobs=[None])
    expect(processor, request)
    # Runner V1 returns a row for each position except the last, V2 for each position that it ran except the last.
    for num_rows in (num_virtual_tokens + num_tokens - 1, num_tokens - 1):
        rows = real_rows(processor, table(num_rows))
        expected = list(range(num_rows - num_tokens + 1, num_rows))
        assert [rows.logprobs[:, 0].tolist(), rows.logprob_token_ids[:, 1].tolist()] == [expected, expected]
        assert rows.selected_token_ranks.tolist() == expected


def test_rows_of_other_requests_stay_as_they_are() -> None:
    for extra_args in (None, {}, {"kv_transfer_params": None}, {"kv_transfer_params": {"x": 1}}):
        params = types.SimpleNamespace(extra_args=extra_args)
        processor = types.SimpleNamespace(prompt_logprobs=[None])
        expect(processor, types.SimpleNamespace(sampling_params=params, prompt_token_ids=[7, 8]))
        assert real_rows(processor, rows := table(5)) is rows
