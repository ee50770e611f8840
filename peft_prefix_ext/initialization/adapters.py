"""Other prefixes as the start of a prefix: one of them, its keys alone, or the mean of several.

Keys decide which queries look at a prefix, values what they find there; keys were found to transfer between tasks as
they are (arXiv:2508.17032).
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from peft_prefix_ext.base_model.compatibility import check_layers
from peft_prefix_ext.base_model.layers import ProbedLayer
from peft_prefix_ext.checkpoint.format import LayerKV, PrefixCheckpoint, read_prefix
from peft_prefix_ext.checkpoint.hub import resolve
from peft_prefix_ext.config import PrefixExtConfig


def kv_from_adapters(
    config: PrefixExtConfig, model: PreTrainedModel, layers: list[ProbedLayer]
) -> tuple[list[LayerKV], str]:
    """Returns the K/V of `init_adapter`, their mean where there are several, and a phrase that says so.

    Of a longer prefix the first tokens are taken: their positions are the same. With `init_adapter_part="keys"` the
    values are random.

    Raises:
        ValueError: If one cannot be read, is of another base model, or has too few tokens.
    """
    sources = [config.init_adapter] if isinstance(config.init_adapter, str) else config.init_adapter or []
    prefixes = [_read(source, config, model, layers) for source in sources]
    initial = []
    for layer in layers:
        states = []
        for kind, like in layer.kv._asdict().items():
            shape = [like.shape[0], config.num_virtual_tokens, like.shape[2]]
            if kind == "value" and config.init_adapter_part == "keys":
                states.append(like.new_empty(shape).normal_(std=config.init_std))
                continue
            found = [getattr(prefix.layers[layer.index], kind)[:, : shape[1]] for prefix in prefixes]
            mean = found[0] if len(found) == 1 else torch.stack([state.float() for state in found]).mean(dim=0)
            states.append(mean.to(like.device, like.dtype))
        initial.append(LayerKV(*states))
    what = "adapter" if config.init == "adapter" else "average of adapters"
    # A folder is named, but where it lies is nobody's business.
    names = ", ".join(repr(Path(source).name if Path(source).exists() else source) for source in sources)
    lengths = ", ".join(str(prefix.num_virtual_tokens) for prefix in prefixes)
    cut = f" (the first of {lengths} tokens)" if lengths != str(config.num_virtual_tokens) else ""
    keys = f", keys only, values random of standard deviation {config.init_std}"
    return initial, f"{what} {names}{cut}{keys if config.init_adapter_part == 'keys' else ''}"


def _read(source: str, config: PrefixExtConfig, model: PreTrainedModel, layers: list[ProbedLayer]) -> PrefixCheckpoint:
    prefix = read_prefix(resolve(source))
    check_layers(prefix, model, layers)
    if prefix.num_virtual_tokens < config.num_virtual_tokens:
        raise ValueError(
            f"The prefix in {prefix.path} has {prefix.num_virtual_tokens} virtual tokens, too few to start "
            f"`num_virtual_tokens={config.num_virtual_tokens}` from; `compose` makes longer prefixes of several."
        )
    return prefix
