"""What the log says of the adapters at the start."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from peft_prefix_ext.checkpoint.compatibility import StateShape
from vllm_plugin.adapters.registry import Adapter
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.adapters.startup_log import MAX_LINES, log_adapters, log_cache

SHAPES = ((0, 2, 32, 32), (1, 2, 32, 16))


def adapter(p: int, name: str | None = None) -> Adapter:
    return Adapter(PrefixSpec(name or f"p{p}", "", "", p, ""), None, SHAPES)


def lines(caplog: pytest.LogCaptureFixture, *adapters: Adapter) -> list[str]:
    with caplog.at_level(logging.INFO, "vllm.prefix_adapters"):
        log_adapters(adapters, 32, 2)
    return [record.getMessage() for record in caplog.records]


def test_one_line_per_adapter_and_better_lengths(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(caplog, adapter(64), adapter(7), adapter(130)) == [
        "Prefix adapter 'p64': 64 virtual tokens, 2 layers, 0.03 MiB, aligned.",
        "Prefix adapter 'p7': 7 virtual tokens, 2 layers, 0.00 MiB, a tail of 7 tokens.",
        "Prefix adapter 'p130': 130 virtual tokens, 2 layers, 0.06 MiB, a tail of 2 tokens.",
        "Virtual tokens past the last full block of 32 tokens are copied for each request; prefixes of a multiple of that "
        "are shared whole: 'p7' (7; better 32), 'p130' (130; better 128 or 160).",
    ]


def test_a_prefix_for_the_draft_model(caplog: pytest.LogCaptureFixture) -> None:
    draft = PrefixSpec("a", "", "", 64, "")
    (line,) = lines(caplog, Adapter(PrefixSpec("a", "", "", 64, "", draft=draft), None, SHAPES))
    assert line.endswith("aligned, with a prefix for the draft model.")


def test_many_are_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    first, second = lines(caplog, *(adapter(33, str(number)) for number in range(MAX_LINES + 1)))
    assert first == "21 prefix adapters: 693 virtual tokens, 0.30 MiB."
    assert second.endswith("'4' (33; better 32 or 64). So it is with 16 more.")


def test_aligned_adapters_need_no_advice(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(caplog) == []
    assert len(lines(caplog, adapter(32))) == 1


def test_states(caplog: pytest.LogCaptureFixture) -> None:
    states = tuple(StateShape(layer, kind, 0, (64, 2048)) for layer in (0, 2) for kind in ("conv", "recurrent"))
    (message,) = lines(caplog, dataclasses.replace(adapter(32), states=states))
    assert message == "Prefix adapter 'p32': 32 virtual tokens, 2 layers and the states of 2, 1.01 MiB, aligned."


def test_the_size_of_a_block(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vllm.prefix_adapters"):
        log_cache(128)
        log_cache(528, is_hybrid=True)
    assert caplog.messages == [
        "Blocks of the KV cache hold 128 tokens (--block-size).",
        "Blocks of the KV cache hold 528 tokens (--block-size, raised by vLLM until a block is as large as the state of a "
        "recurrent layer).",
    ]
