"""The test that a model passes before it gets a prefix: the prefix of a short text must act like the text itself.

It knows nothing of the architecture, so it finds all models whose positions, masks, caches, attention function or
recurrent layers a prefix would silently break. Where recurrent layers have no prefix, a text does more than its K/V; there,
only the passes with and without a cache must agree.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from peft_prefix_ext.architectures.select import select_layer_class
from peft_prefix_ext.architectures.shared_kv import SharedKVLayer, find_shared_kv_layers
from peft_prefix_ext.base_model.attention_implementation import attention_implementation
from peft_prefix_ext.base_model.cache_argument import cache_argument
from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.base_model.layers import ProbedLayer, eval_mode, record
from peft_prefix_ext.base_model.offloaded import input_device
from peft_prefix_ext.base_model.states import ProbedState
from peft_prefix_ext.base_model.supported import check_supported
from peft_prefix_ext.checkpoint.format import LayerKV, LayerState
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.injection.caller_positions import enclosing_models
from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook
from peft_prefix_ext.injection.layer import PrefixExtLayer
from peft_prefix_ext.injection.state_layer import PrefixStateLayer

NUM_TEXT, NUM_NEW, NUM_PADDING = 4, 4, 3
_NAME = "self_test"


@torch.no_grad()
def check_prefix_matches_text(model: PreTrainedModel, decoder: nn.Module, with_states: bool = False) -> None:
    """Compares the outputs of a frozen model for a few tokens after a text with those after the prefix of that text.

    Args:
        model: The model.
        decoder: The module within it that takes the cache.
        with_states: Whether its recurrent layers have a prefix, too.

    Raises:
        ValueError: If they differ.
    """
    name = describe(model)
    remedy = ", unless `state_prefix` is False" if with_states else ""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = [token for token in range(NUM_TEXT + NUM_NEW + 1) if token != padding][: NUM_TEXT + NUM_NEW]
    outputs: list[torch.Tensor] = []
    handle = decoder.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    device = input_device(model)
    new = torch.tensor([ids[NUM_TEXT:]], device=device)
    padded = torch.cat([new[:, :1].expand(1, NUM_PADDING), new], dim=1)
    mask = (torch.arange(NUM_PADDING + NUM_NEW, device=device) >= NUM_PADDING).long()[None]
    cache = DynamicCache(config=model.config)
    cache_name = cache_argument(model) or cache_argument(decoder)
    assert cache_name is not None  # checked by `find_decoder`
    try:
        states = record(model, ids[:NUM_TEXT]).states if with_states else []
        outputs.clear()
        layers = record(model, ids).layers
        is_text = bool(states) or not any(layer.in_hybrid for layer in layers)
        with eval_mode(model), _prefix_of_text(model, decoder, layers, states):
            model(input_ids=new, use_cache=False)
            model(input_ids=new[:, :-1], **{cache_name: cache}, use_cache=True)
            model(input_ids=new[:, -1:], **{cache_name: cache}, use_cache=True)
            model(input_ids=padded, attention_mask=mask, use_cache=False)
        with eval_mode(model):
            model(input_ids=new, use_cache=False)
            model(input_ids=padded, attention_mask=mask, use_cache=False)
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name} does not run with a prefix, so PREFIX_EXT does not support it{remedy}: {reason}"
        ) from error
    finally:
        handle.remove()
    text, at_once, prefill, decoded, behind_padding, alone, alone_padded = outputs
    in_steps = torch.cat([prefill, decoded], dim=1)
    # Half precision and quantized weights round: then one token that is routed to another expert must not matter.
    is_exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())
    pairs = [(in_steps, at_once)]
    if is_text:
        pairs += [(at_once, text[:, NUM_TEXT:]), (in_steps, text[:, NUM_TEXT:])]
    limit = 0.01 if is_exact else 0.15
    # Only in models that count distances in columns does padding change the outputs without a prefix as well.
    if is_text and _difference(alone_padded[:, NUM_PADDING:], alone, is_exact) <= limit:
        pairs += [(behind_padding[:, NUM_PADDING:], at_once)]
    difference = max(_difference(some, others, is_exact) for some, others in pairs)
    if difference > limit:
        raise ValueError(
            f"{name} gives other logits after a prefix than after the text it stands for (by {difference:.0%}), so "
            f"PREFIX_EXT does not support it{remedy}."
        )


def check_decoder_matches_text(decoder: PreTrainedModel) -> None:
    """Tests a decoder alone, after its attention implementation was changed.

    Raises:
        ValueError: As `check_prefix_matches_text`, or if the implementation is known not to work.
    """
    check_supported(decoder)
    has_states = any(isinstance(module, PrefixStateLayer) for module in decoder.modules())
    check_prefix_matches_text(decoder, decoder, with_states=has_states)


def _difference(some: torch.Tensor, others: torch.Tensor, is_exact: bool) -> float:
    """Returns the relative difference of the tokens' vectors: the largest one if exact, else the median."""
    by_token = ((some - others).float().norm(dim=-1) / others.float().norm(dim=-1).clamp(min=1e-6)).flatten()
    return float(by_token.max() if is_exact else by_token.median())


@contextmanager
def _prefix_of_text(
    model: PreTrainedModel, decoder: nn.Module, layers: list[ProbedLayer], states: list[ProbedState]
) -> Iterator[None]:
    """Gives `model` the prefix of the text in `layers` and `states`, by hooks only: no module is added to it."""
    config = PrefixExtConfig(num_virtual_tokens=NUM_TEXT)
    hook = PrefixDecoderHook(decoder, enclosing_models(decoder, model))
    hook.num_virtual_tokens[_NAME] = NUM_TEXT
    hook.configs[_NAME] = config
    hook.tested_attention.add(attention_implementation(model.config))  # by this very test
    hooked: list[PrefixDecoderHook | PrefixExtLayer | PrefixStateLayer] = [hook]
    for probed in layers:
        attention = model.get_submodule(probed.module)
        layer = select_layer_class(attention, probed)(attention, probed, hook)
        kv = LayerKV(*(state[:, :NUM_TEXT] for state in probed.kv))
        layer.update_layer(_NAME, kv, config, has_reparam=False)
        # With `low_cpu_mem_usage` the parameters have no data.
        own = LayerKV(*(probed.local_heads(state) for state in kv))
        layer.materialize = functools.partial(_return_kv, own)  # type: ignore[method-assign]
        hooked.append(layer)
    for each in states:
        parent, mixer = model.get_submodule(each.module.rpartition(".")[0]), model.get_submodule(each.module)
        state_layer = PrefixStateLayer(mixer, parent, each, hook)
        state_layer.update_layer(_NAME, each.states, config)
        state_layer.materialize = functools.partial(_return_states, each.states)  # type: ignore[method-assign]
        hooked.append(state_layer)
    by_module = {layer.module: layer for layer in layers}
    hook.shared_kv_layers = [
        SharedKVLayer(module, owner, hook) for module, owner in find_shared_kv_layers(model, by_module)
    ]
    for tuner_layer in hooked:
        tuner_layer.set_adapter(_NAME)
        tuner_layer.eval()
    try:
        yield
    finally:
        for tuner_layer in hooked:
            tuner_layer.detach()


def _return_kv(kv: LayerKV, *args: object) -> LayerKV:
    return kv


def _return_states(states: LayerState, *args: object) -> LayerState:
    return states
