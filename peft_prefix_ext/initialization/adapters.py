"""Initial K/V and states from other prefixes (`init_adapter`): one of them, its keys alone, or the mean of several.

Keys decide which queries attend to a prefix, values what these read. Keys transfer between tasks without change
(arXiv:2508.17032).
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from peft_prefix_ext.base_model.compatibility import check_layers
from peft_prefix_ext.base_model.layers import ProbedModel
from peft_prefix_ext.base_model.states import ProbedState
from peft_prefix_ext.checkpoint.format import LayerKV, LayerState, PrefixCheckpoint
from peft_prefix_ext.checkpoint.hub import resolve
from peft_prefix_ext.checkpoint.reader import read_prefix
from peft_prefix_ext.config import PrefixExtConfig


def read_adapters(
    config: PrefixExtConfig, model: PreTrainedModel, probed: ProbedModel
) -> tuple[list[LayerKV], list[LayerState] | None, str]:
    """Returns the K/V and states of `init_adapter`, or their mean for several adapters, and a phrase on the source.

    Of a longer prefix it takes the first tokens, which have the same positions, and the states after all of its tokens.
    With `init_adapter_part="keys"` the values are random.

    Args:
        config: The config of the new adapter.
        model: The base model.
        probed: The layers that get a prefix.

    Returns:
        The K/V of each layer, `[num_kv_heads, num_virtual_tokens, head_dim]` each; the states of each recurrent layer, `None`
        if an adapter has none or only its keys are taken; and the phrase.

    Raises:
        ValueError: If an adapter cannot be read, is of another base model, or has too few virtual tokens.
    """
    sources = [config.init_adapter] if isinstance(config.init_adapter, str) else config.init_adapter or []
    prefixes = [_read(source, config, model, probed) for source in sources]
    initial = []
    for layer in probed.layers:
        kv = []
        for kind, like in layer.kv._asdict().items():
            shape = [like.shape[0], config.num_virtual_tokens, like.shape[2]]
            if kind == "value" and config.init_adapter_part == "keys":
                kv.append(like.new_empty(shape).normal_(std=config.init_std))
                continue
            kv.append(_mean([getattr(prefix.layers[layer.index], kind)[:, : shape[1]] for prefix in prefixes], like))
        initial.append(LayerKV(*kv))
    states = None
    if all(prefix.states for prefix in prefixes) and config.init_adapter_part == "all":
        states = [_mean_states([prefix.states[each.index] for prefix in prefixes], each) for each in probed.states]
    return initial, states, _describe(sources, prefixes, config)


def _mean(tensors: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    mean = tensors[0] if len(tensors) == 1 else torch.stack([tensor.float() for tensor in tensors]).mean(dim=0)
    return mean.to(like.device, like.dtype)


def _mean_states(states: list[LayerState], probed: ProbedState) -> LayerState:
    kinds = []
    for kind, likes in probed.states._asdict().items():
        by_number = zip(*(getattr(each, kind) for each in states), strict=True)
        kinds.append(tuple(_mean(list(tensors), like) for tensors, like in zip(by_number, likes, strict=True)))
    return LayerState(*kinds)


def _describe(sources: list[str], prefixes: list[PrefixCheckpoint], config: PrefixExtConfig) -> str:
    what = "adapter" if config.init == "adapter" else "average of adapters"
    # The phrase is saved with the adapter: keep the name of a local folder, but not its path.
    names = ", ".join(repr(Path(source).name if Path(source).exists() else source) for source in sources)
    lengths = ", ".join(str(prefix.num_virtual_tokens) for prefix in prefixes)
    cut = f" (the first of {lengths} tokens)" if lengths != str(config.num_virtual_tokens) else ""
    keys = f", keys only, values random of standard deviation {config.init_std}"
    return f"{what} {names}{cut}{keys if config.init_adapter_part == 'keys' else ''}"


def _read(source: str, config: PrefixExtConfig, model: PreTrainedModel, probed: ProbedModel) -> PrefixCheckpoint:
    prefix = read_prefix(resolve(source))
    check_layers(prefix, model, probed)
    if prefix.num_virtual_tokens < config.num_virtual_tokens:
        raise ValueError(
            f"The prefix in {prefix.path} has {prefix.num_virtual_tokens} virtual tokens, too few to initialize "
            f"`num_virtual_tokens={config.num_virtual_tokens}`; `compose` joins several prefixes into a longer one."
        )
    return prefix
