"""A last look before a prefix is attached: the prefix of a short text must do what the text itself does.

It needs no knowledge of the architecture, and so finds the ones whose positions, masks or caches a prefix would silently get
wrong. Where layers are recurrent, a text does more than its K/V; there only the passes with and without a cache must agree.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from peft_prefix_ext.checkpoint import LayerKV
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.describe import describe
from peft_prefix_ext.geometry import RecordedLayer, evaluating, record_layers
from peft_prefix_ext.layer import PrefixExtLayer
from peft_prefix_ext.runtime import PrefixRuntime
from peft_prefix_ext.sharing import SharedKVLayer, find_shared
from peft_prefix_ext.variants import layer_class

NUM_TEXT, NUM_NEW = 4, 4
_NAME = "rehearsal"


@torch.no_grad()
def rehearse(model: PreTrainedModel, decoder: nn.Module) -> None:
    """Runs the frozen `model`, whose inner `decoder` takes the cache, on a few tokens after a text and after its prefix.

    Raises:
        ValueError: If the two differ.
    """
    name = describe(model)
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = [token for token in range(NUM_TEXT + NUM_NEW + 1) if token != padding][: NUM_TEXT + NUM_NEW]
    said: list[torch.Tensor] = []
    handle = decoder.register_forward_hook(lambda module, args, output: said.append(output[0]))
    new = torch.tensor([ids[NUM_TEXT:]], device=model.device)
    cache = DynamicCache(config=model.config)
    try:
        layers = record_layers(model, ids)
        with evaluating(model), _prefix_of_text(model, decoder, layers):
            model(input_ids=new, use_cache=False)
            model(input_ids=new[:, :-1], past_key_values=cache, use_cache=True)
            model(input_ids=new[:, -1:], past_key_values=cache, use_cache=True)
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} does not run with a prefix, so PREFIX_EXT does not support it: {error}") from error
    finally:
        handle.remove()
    text, at_once, prefill, decoded = said
    in_steps = torch.cat([prefill, decoded], dim=1)
    # Half precision and quantized weights round: there a single expert chosen otherwise must not matter.
    is_exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())
    pairs = [(in_steps, at_once)]
    if not layers[0].in_hybrid:
        pairs += [(at_once, text[:, NUM_TEXT:]), (in_steps, text[:, NUM_TEXT:])]
    difference = max(_difference(some, others, is_exact) for some, others in pairs)
    if difference > (0.01 if is_exact else 0.15):
        raise ValueError(
            f"{name} would say something else after a prefix than after the text it stands for (by {difference:.0%}), so "
            "PREFIX_EXT does not support it."
        )


def _difference(some: torch.Tensor, others: torch.Tensor, is_exact: bool) -> float:
    """The relative difference of the tokens' vectors: the largest, or else the median one."""
    by_token = ((some - others).float().norm(dim=-1) / others.float().norm(dim=-1).clamp(min=1e-6)).flatten()
    return float(by_token.max() if is_exact else by_token.median())


@contextmanager
def _prefix_of_text(model: nn.Module, decoder: nn.Module, layers: list[RecordedLayer]) -> Iterator[None]:
    """Lets hooks alone give `model` the prefix that was recorded: no module becomes a part of it."""
    config = PrefixExtConfig(num_virtual_tokens=NUM_TEXT)
    runtime = PrefixRuntime(decoder)
    runtime.num_virtual_tokens[_NAME] = NUM_TEXT
    runtime.prefix_dropout[_NAME] = 0.0
    hooked: list[PrefixRuntime | PrefixExtLayer] = [runtime]
    for recorded in layers:
        attention = model.get_submodule(recorded.module)
        layer = layer_class(attention, recorded)(attention, recorded, runtime)
        kv = LayerKV(*(state[:, :NUM_TEXT] for state in recorded.kv))
        layer.update_layer(_NAME, kv, config, has_reparam=False)
        # Under `low_cpu_mem_usage` the parameters are without data.
        layer.materialize = functools.partial(_given, kv)  # type: ignore[method-assign]
        hooked.append(layer)
    by_module = {layer.module: layer for layer in layers}
    runtime.shared_layers = [SharedKVLayer(module, owner, runtime) for module, owner in find_shared(model, by_module)]
    for tuner_layer in hooked:
        tuner_layer.set_adapter(_NAME)
        tuner_layer.eval()
    try:
        yield
    finally:
        for tuner_layer in hooked:
            tuner_layer.detach()


def _given(kv: LayerKV, *args: object) -> LayerKV:
    return kv
