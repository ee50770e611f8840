"""Tiny hybrids with prefixes in an engine: attention layers with K/V, recurrent layers that start from zero or from states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers.prefixed import with_prefix
from helpers.serving.architectures import LENGTHS, Reference, Served, generate


class ServedHybrid(Served):
    """A hybrid in an engine, with prefixes of several lengths, each with recurrent states (`s7`) and without (`p7`)."""

    # vLLM runs a prompt of one token behind a prefix as it runs a new token.
    prompt_lengths = (1, 40, 71)

    def references(self, base: Callable[[], Any], folder: Path) -> dict[str | None, Reference]:
        references: dict[str | None, Reference] = {None: partial(generate, base())}
        for length in LENGTHS:
            # The same K/V: only the states tell these two apart.
            for name, has_states in ((f"s{length}", True), (f"p{length}", False)):
                model = with_prefix(base(), seed=length, num_virtual_tokens=length, state_prefix=has_states)
                model.save_pretrained(folder / name)
                references[name] = partial(generate, model)
        return references

    @property
    def writer(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().writer

    def metric(self, name: str) -> int:
        return sum(int(metric.value) for metric in self.llm.get_metrics() if metric.name == name)

    def fill_with_noise(self) -> None:
        """Fills all states, as a pool in use has them: a state that is not written then shows."""
        torch.manual_seed(0)
        modules = self.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        for layer in self.writer._manager._state_layers:
            for states in modules[layer.name].kv_cache:
                states.normal_(std=3.0)
