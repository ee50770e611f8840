"""The active adapters of a live model that are not prefixes, such as LoRA under a prefix."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save
from torch import nn
from torch.distributed.tensor import DTensor

from peft_prefix_ext.base_model.zero3 import is_partitioned
from peft_prefix_ext.checkpoint.base_adapters import BaseAdapter, are_alike, model_with, read_base_adapters
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer


def active_base_adapters(model: Any) -> list[BaseAdapter]:
    """Returns the active adapters of a base model, in a `PeftModel` or not, except its prefixes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    # `disable_adapter` temporarily disables all adapters, the prefix as well.
    all_off = any(isinstance(layer, PrefixTunerLayer) and layer.disable_adapters for layer in layers)
    active = dict.fromkeys(
        name
        for layer in layers
        if not isinstance(layer, PrefixTunerLayer) and (all_off or not layer.disable_adapters)
        for name in layer.active_adapters
        if name in layer._all_available_adapter_names()
    )
    return [
        BaseAdapter(
            name, config.peft_type.value, base_model_name_or_path=config.base_model_name_or_path, **_digests(base, name)
        )
        for name in active
        for config in [base.peft_config[name]]
        if not isinstance(config, PrefixExtConfig)  # a prefix that trains tokens has layers of PEFT too
    ]


def _digests(base: nn.Module, name: str) -> dict[str, str]:
    # Not `state_dict`, which all processes of a sharded model would have to call.
    parameters: dict[str, Any] = dict(base.named_parameters(remove_duplicate=False))
    parameters |= base.named_buffers(remove_duplicate=False)
    state = get_peft_model_state_dict(base, parameters, name, save_embedding_layers=False)
    if any(tensor.is_meta or isinstance(tensor, DTensor) or is_partitioned(tensor) for tensor in state.values()):
        return {}
    tensors = {f"base_model.model.{key}": tensor.detach().cpu().clone() for key, tensor in state.items()}
    rounded = {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}
    return {"digest": _sha256(tensors), "rounded_digest": _sha256(rounded)}


def _sha256(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(save(tensors, metadata={"format": "pt"})).hexdigest()


def warn_of_other_adapters(config: PrefixExtConfig, model: nn.Module) -> None:
    """Warns if a saved prefix was trained with other base adapters than `model` has now.

    Not an error: they may be loaded later, and LoRA that was merged into the weights leaves no trace.
    """
    if config.base_adapters is None:  # saved by an earlier release
        return
    expected, present = read_base_adapters(config.base_adapters), active_base_adapters(model)
    if not are_alike(expected, present):
        remedy = "load what is missing too, unless it is merged into the weights" if expected else "take them off"
        warnings.warn(
            f"The prefix was trained on {model_with(expected)} and is loaded on {model_with(present)}, where it says "
            f"something else: {remedy}.",
            stacklevel=2,
        )
