"""Initial K/V from other prefixes (`init_adapter`): one of them, its keys alone, or the mean of several.

Keys decide which queries attend to a prefix, values what these read. Keys transfer between tasks without change
(arXiv:2508.17032).
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from peft_prefix_ext.base_model.compatibility import check_layers
from peft_prefix_ext.base_model.layers import ProbedLayer
from peft_prefix_ext.checkpoint.format import LayerKV, PrefixCheckpoint
from peft_prefix_ext.checkpoint.hub import resolve
from peft_prefix_ext.checkpoint.reader import read_prefix
from peft_prefix_ext.config import PrefixExtConfig


def kv_from_adapters(
    config: PrefixExtConfig, model: PreTrainedModel, layers: list[ProbedLayer]
) -> tuple[list[LayerKV], str]:
    """Returns the K/V of `init_adapter`, or their mean for several adapters, and a phrase on the source.

    Of a longer prefix it takes the first tokens, which have the same positions. With `init_adapter_part="keys"` the
    values are random.

    Args:
        config: The config of the new adapter.
        model: The base model.
        layers: The attention layers that get a prefix.

    Returns:
        The K/V of each layer, `[num_kv_heads, num_virtual_tokens, head_dim]` each, and the phrase.

    Raises:
        ValueError: If an adapter cannot be read, is of another base model, or has too few virtual tokens.
    """
    sources = [config.init_adapter] if isinstance(config.init_adapter, str) else config.init_adapter or []
    prefixes = [_read(source, config, model, layers) for source in sources]
    initial = []
    for layer in layers:
        kv = []
        for kind, like in layer.kv._asdict().items():
            shape = [like.shape[0], config.num_virtual_tokens, like.shape[2]]
            if kind == "value" and config.init_adapter_part == "keys":
                kv.append(like.new_empty(shape).normal_(std=config.init_std))
                continue
            found = [getattr(prefix.layers[layer.index], kind)[:, : shape[1]] for prefix in prefixes]
            mean = found[0] if len(found) == 1 else torch.stack([tensor.float() for tensor in found]).mean(dim=0)
            kv.append(mean.to(like.device, like.dtype))
        initial.append(LayerKV(*kv))
    return initial, _describe(sources, prefixes, config)


def _describe(sources: list[str], prefixes: list[PrefixCheckpoint], config: PrefixExtConfig) -> str:
    what = "adapter" if config.init == "adapter" else "average of adapters"
    # The phrase is saved with the adapter: keep the name of a local folder, but not its path.
    names = ", ".join(repr(Path(source).name if Path(source).exists() else source) for source in sources)
    lengths = ", ".join(str(prefix.num_virtual_tokens) for prefix in prefixes)
    cut = f" (the first of {lengths} tokens)" if lengths != str(config.num_virtual_tokens) else ""
    keys = f", keys only, values random of standard deviation {config.init_std}"
    return f"{what} {names}{cut}{keys if config.init_adapter_part == 'keys' else ''}"


def _read(source: str, config: PrefixExtConfig, model: PreTrainedModel, layers: list[ProbedLayer]) -> PrefixCheckpoint:
    prefix = read_prefix(resolve(source))
    check_layers(prefix, model, layers)
    if prefix.num_virtual_tokens < config.num_virtual_tokens:
        raise ValueError(
            f"The prefix in {prefix.path} has {prefix.num_virtual_tokens} virtual tokens, too few to initialize "
            f"`num_virtual_tokens={config.num_virtual_tokens}`; `compose` joins several prefixes into a longer one."
        )
    return prefix
