"""What trains beside a prefix: whole modules of the base model, such as a head, and the embeddings of some tokens.

PEFT wraps the modules, trains, saves and loads them.
"""

from __future__ import annotations

from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_prefix_ext.config import PrefixExtConfig


def check_trained_tokens(config: PrefixExtConfig, model: PreTrainedModel) -> None:
    """Checks `trainable_token_indices`, before PEFT does so in a model that is changed already.

    Raises:
        ValueError: If the model has no such tokens, or trains all embeddings anyhow.
    """
    given = config.trainable_token_indices
    if given is None:
        return
    by_module = given if isinstance(given, dict) else {"": given}
    for name, tokens in by_module.items():
        found = [module for path, module in model.named_modules() if path.endswith(name)]
        found = found if name else [model.get_input_embeddings()]
        if not found:
            raise ValueError(f"`trainable_token_indices` must be of modules of {type(model).__name__}, got {name!r}.")
        if name in (config.modules_to_save or ()):
            raise ValueError(
                f"`trainable_token_indices` must not be of {name!r}, all of which `modules_to_save` trains."
            )
        size = getattr(found[0], "num_embeddings", None)
        if size is not None and (outside := [token for token in tokens if not 0 <= token < size]):
            raise ValueError(
                f"`trainable_token_indices` must be >= 0 and < {size}, the vocabulary of the model, got {outside[0]}."
            )


def unwrap(model: nn.Module, configs: dict[str, Any], names: set[str]) -> None:
    """Takes what the adapters `names` train off the model: as ever in PEFT, a head that was trained stays in its place.

    What another of the adapters of `configs` trains as well, such as LoRA's head, is that adapter's again.
    """
    for path, module in list(model.named_modules()):
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        others = sorted(module._adapters - names)
        if others:
            for name in module._adapters & names:
                module.delete_adapter(name, new_active_adapters=None)
            module.set_adapter(others[0], inference_mode=configs[others[0]].inference_mode)
        else:
            parent, _, child = path.rpartition(".")
            bare = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
            setattr(model.get_submodule(parent), child, bare)
