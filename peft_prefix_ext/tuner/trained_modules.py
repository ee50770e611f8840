"""What trains beside a prefix: modules of the base model, such as a head, and the embeddings of some tokens.

PEFT wraps, trains, saves and loads them.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_prefix_ext.config import PrefixExtConfig


def settle_trained_tokens(config: PrefixExtConfig, model: PreTrainedModel) -> None:
    """Checks `trainable_token_indices`; PEFT would do so after the model was changed.

    Raises:
        ValueError: If the model has no such tokens, or all of its embeddings train.
    """
    given = config.trainable_token_indices
    if given is not None:
        _check(config, given if isinstance(given, dict) else {"": given}, model)
        _leave_tied_head(config, given, model)


def _check(config: PrefixExtConfig, by_module: dict[str, list[int]], model: PreTrainedModel) -> None:
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


def _leave_tied_head(config: PrefixExtConfig, given: Any, model: PreTrainedModel) -> None:
    """Removes a head that is tied to embeddings with trained tokens from `modules_to_save`, where TRL always puts it.

    PEFT trains the tokens of both together. It would also wrap the copy of the head, which then fails to run.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    wanted = config.modules_to_save
    if not wanted or head is None or not getattr(model.config, "tie_word_embeddings", False):
        return
    paths: dict[Any, str] = {module: path for path, module in model.named_modules()}
    if isinstance(given, dict) and not paths[embeddings].endswith(tuple(given)):
        return
    kept = [name for name in wanted if not paths[head].endswith(name)]
    if kept != wanted:
        config.modules_to_save = kept or None
        warnings.warn(
            f"{paths[head]!r} has the weights of the embeddings, so only the tokens of `trainable_token_indices` train in it, "
            "and not all of it as `modules_to_save` says.",
            stacklevel=2,
        )


def complete_tied_head(model: PreTrainedModel) -> None:
    """Sets the missing bias of a tied head with trained tokens to `None`: TRL's losses read its weight and its bias."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and getattr(head.original_module, "bias", None) is None:
        head.register_parameter("bias", None)


def unwrap(model: nn.Module, configs: dict[str, Any], names: set[str]) -> None:
    """Removes PEFT's wrappers of the adapters `names`; as always in PEFT, trained modules stay in the model.

    A module that another adapter of `configs` trains as well, such as LoRA's head, is left to that adapter.
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
