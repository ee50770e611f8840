"""Tiny hybrids with prefixes in an engine: attention layers with K/V, recurrent layers that start from zero or from states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache

from helpers.prefixed import with_prefix
from helpers.serving.architectures import LENGTHS, NEW_TOKENS, Answer, Reference, Served, generate
from peft_prefix_ext.checkpoint import LayerState, read_prefix, write_prefix


class ServedHybrid(Served):
    """A hybrid in an engine, with prefixes of several lengths, each with recurrent states (`s7`) and without (`p7`)."""

    # vLLM runs a prompt of one token behind a prefix as it runs a new token.
    prompt_lengths = (1, 40, 71)

    def references(self, base: Callable[[], Any], folder: Path) -> dict[str | None, Reference]:
        references: dict[str | None, Reference] = {None: partial(generate, base())}
        for length in LENGTHS:
            model = with_prefix(base(), seed=length, num_virtual_tokens=length, state_prefix=False)
            model.save_pretrained(folder / f"p{length}")
            references[f"p{length}"] = partial(generate, model)
            states = random_states(base(), seed=length)
            write_states(folder / f"s{length}", folder / f"p{length}", states)
            references[f"s{length}"] = partial(generate_from_states, model, states)
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


@torch.no_grad()
def random_states(model: Any, seed: int) -> dict[int, LayerState]:
    """Returns random states for each recurrent layer of a model, with the shapes of its own cache."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
    generator = torch.Generator().manual_seed(seed)
    states = {}
    for index, layer in enumerate(cache.layers):
        kinds = [getattr(layer, f"{kind}_states", {}) for kind in LayerState._fields]
        # transformers keeps one column more than the convolution reads.
        conv, recurrent = (
            tuple(
                torch.randn(kind[number][0].shape, generator=generator) * 0.5
                for number in sorted(kind)
                if kind[number] is not None
            )
            for kind in kinds
        )
        if conv:
            states[index] = LayerState(tuple(each[:, 1:].contiguous() for each in conv), recurrent)
    return states


def write_states(folder: Path, prefix: Path, states: dict[int, LayerState]) -> None:
    """Saves the K/V of another adapter together with these states."""
    other = read_prefix(prefix)
    fields = {name: other.config[name] for name in ("base_model_name_or_path", "base_fingerprint", "task_type")}
    modules = {index: f"model.layers.{index}.mixer" for index in states}
    write_prefix(folder, other.layers, other.modules, states=states, state_modules=modules, **fields)


@torch.no_grad()
def generate_from_states(model: PeftModel, states: dict[int, LayerState], prompt: list[int]) -> Answer:
    """Returns the greedy tokens of a model with a prefix, whose recurrent layers start from `states`.

    The attention layers read the prefix by the hooks of `PeftModel`, the recurrent layers find the states in the cache.
    """
    cache = DynamicCache(config=model.config)
    for index, state in states.items():
        layer = cache.layers[index]
        for number, conv in enumerate(state.conv):
            conv = torch.cat([torch.zeros_like(conv[:, :1]), conv], -1)[None]
            layer.lazy_initialization(conv_states=conv, state_idx=number)
            layer.conv_states[number] = conv.clone()
            layer.has_previous_state[number] = True
        for number, recurrent in enumerate(state.recurrent):
            layer.lazy_initialization(recurrent_states=recurrent[None], state_idx=number)
            layer.recurrent_states[number] = recurrent[None].clone()
    ids, tokens, logprobs = torch.tensor([prompt]), [], []
    for _ in range(NEW_TOKENS):
        row = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1].log_softmax(-1)
        tokens.append(int(row.argmax()))
        logprobs.append(float(row[tokens[-1]]))
        ids = torch.tensor([tokens[-1:]])
    return tokens, logprobs
