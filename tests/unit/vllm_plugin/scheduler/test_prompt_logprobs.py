"""The rows of prompt log-probabilities that belong to real tokens, for both model runners."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from vllm.v1.outputs import LogprobsTensors

from vllm_plugin.adapters.spec import PrefixSpec, pack
from vllm_plugin.kv_transfer_config import ADAPTERS
from vllm_plugin.scheduler.prompt_logprobs import keep_real_rows


def table(num_rows: int) -> LogprobsTensors:
    values = torch.arange(num_rows)
    return LogprobsTensors(values[:, None].repeat(1, 2), values[:, None].repeat(1, 2).float(), values)


def request(num_prompt_tokens: int, transfer: Any) -> Any:
    return types.SimpleNamespace(num_prompt_tokens=num_prompt_tokens, kv_transfer_params=transfer)


@pytest.mark.parametrize("num_tokens", [1, 2, 70])
@pytest.mark.parametrize("num_virtual_tokens", [1, 33])
def test_the_last_rows_are_those_of_real_tokens(num_tokens: int, num_virtual_tokens: int) -> None:
    packed = pack(PrefixSpec("a", "a", "/a", num_virtual_tokens, "digest"))
    requests = {"a": request(num_virtual_tokens + num_tokens, {ADAPTERS: packed})}
    # Runner V1 returns a row for each position except the last, V2 for each position that it ran except the last.
    for num_rows in (num_virtual_tokens + num_tokens - 1, num_tokens - 1):
        tensors: dict[str, Any] = {"a": table(num_rows)}
        keep_real_rows(requests, tensors)
        rows, expected = tensors["a"], list(range(num_rows - num_tokens + 1, num_rows))
        assert [rows.logprobs[:, 0].tolist(), rows.logprob_token_ids[:, 1].tolist()] == [expected, expected]
        assert rows.selected_token_ranks.tolist() == expected


def test_rows_of_other_requests_stay_as_they_are() -> None:
    requests = {"none": request(2, None), "other": request(2, {"x": 1})}
    # The last one has ended meanwhile.
    tensors: dict[str, Any] = {"none": table(5), "other": table(5), "gone": table(5)}
    before = dict(tensors)
    keep_real_rows(requests, tensors)
    assert all(tensors[name] is before[name] for name in before)
    keep_real_rows(requests, unfinished := {"none": None})
    assert unfinished == {"none": None}
