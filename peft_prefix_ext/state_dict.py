"""Between the parameters of a live adapter and the tensors of its checkpoint (see `checkpoint.py` for the format).

Saved beside the K/V when there is a reparameterization and `save_reparam` is on: what it adds to, as
`prefix_ext_init_key` and `prefix_ext_init_value` of each layer, and its own parameters under `REPARAM`.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import nn

from peft_prefix_ext.checkpoint import LayerKV, layer_key
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.layer import PrefixExtLayer, assemble
from peft_prefix_ext.runtime import PrefixRuntime

REPARAM = "base_model.model.prefix_ext.prefix_ext_reparam"
State = dict[str, torch.Tensor]


class LiveAdapter(NamedTuple):
    """Where the parts of an adapter are within a model, by their names in its state dict."""

    runtime_name: str
    runtime: PrefixRuntime
    layers: dict[str, PrefixExtLayer]


def find_live(model: nn.Module) -> LiveAdapter:
    """Finds the prefix modules in a model, wrapped in a `PeftModel` or not."""
    modules = dict(model.named_modules())
    ((name, runtime),) = ((name, module) for name, module in modules.items() if isinstance(module, PrefixRuntime))
    return LiveAdapter(
        name, runtime, {name: module for name, module in modules.items() if isinstance(module, PrefixExtLayer)}
    )


@torch.no_grad()
def to_checkpoint(model: nn.Module, config: PrefixExtConfig, adapter_name: str, state: State) -> State:
    """Returns the checkpoint of an adapter whose parameters are in `state`, a state dict of `model`."""
    runtime_name, runtime, layers = find_live(model)
    if adapter_name in runtime.awaiting_weights:
        raise ValueError(f"Adapter {adapter_name!r} cannot be saved: its weights were never loaded.")
    saved: State = {}
    residuals: dict[str, LayerKV] = {}
    if adapter_name in runtime.prefix_ext_reparam:
        mlp = runtime.prefix_ext_reparam[adapter_name]
        parameters = {
            name: state[f"{runtime_name}.prefix_ext_reparam.{adapter_name}.{name}"] for name in mlp.state_dict()
        }
        was_training = mlp.training
        mlp.eval()
        outputs = torch.func.functional_call(mlp, parameters, ())
        mlp.train(was_training)
        residuals = dict(zip(runtime.layer_names[adapter_name], outputs, strict=True))
        if config.save_reparam:
            saved |= {f"{REPARAM}.{name}": tensor for name, tensor in parameters.items()}
    for name, layer in layers.items():
        for number, kind in enumerate(LayerKV._fields):
            frozen = state.get(f"{name}.prefix_ext_frozen_{kind}.{adapter_name}")
            trained = state[f"{name}.prefix_ext_{kind}.{adapter_name}"]
            residual = residuals[layer.module_name][number] if residuals else None
            saved[layer_key(layer.module_name, kind)] = assemble(frozen, trained, residual)
            if residuals and config.save_reparam:
                saved[layer_key(layer.module_name, f"init_{kind}")] = trained
    return saved


def from_checkpoint(model: nn.Module, config: PrefixExtConfig, adapter_name: str, saved: State) -> State:
    """Returns the part of a state dict of `model` that `saved`, a checkpoint, gives an adapter; keeps other tensors.

    Raises:
        ValueError: If the checkpoint lacks a layer, or has other shapes than the adapter.
    """
    runtime_name, runtime, layers = find_live(model)
    state = {name: tensor for name, tensor in saved.items() if "prefix_ext_" not in name}
    mlp = runtime.prefix_ext_reparam[adapter_name] if adapter_name in runtime.prefix_ext_reparam else None
    resumes_mlp = mlp is not None and all(f"{REPARAM}.{name}" in saved for name in mlp.state_dict())
    if mlp is not None:
        if not resumes_mlp:
            warnings.warn(
                f"The checkpoint of adapter {adapter_name!r} has no reparameterization (`save_reparam=False`): its K/V are "
                "kept, and training goes on from them with a new one.",
                stacklevel=2,
            )
        for name, fresh in mlp.state_dict().items():
            new = torch.zeros_like(fresh) if name.startswith("head.") else fresh
            tensor = saved[f"{REPARAM}.{name}"] if resumes_mlp else new
            state[f"{runtime_name}.prefix_ext_reparam.{adapter_name}.{name}"] = tensor
    for name, layer in layers.items():
        for kind in LayerKV._fields:
            parameter = getattr(layer, f"prefix_ext_{kind}")[adapter_name]
            frozen = config.num_virtual_tokens - parameter.shape[1]
            expected = [parameter.shape[0], config.num_virtual_tokens, parameter.shape[2]]
            full = saved.get(layer_key(layer.module_name, kind))
            if full is None or list(full.shape) != expected:
                found = "nothing" if full is None else list(full.shape)
                raise ValueError(
                    f"The checkpoint of adapter {adapter_name!r} has {found} for the {kind} of layer {layer.index}, "
                    f"expected {expected}."
                )
            trained = saved[layer_key(layer.module_name, f"init_{kind}")] if resumes_mlp else full[:, frozen:]
            state[f"{name}.prefix_ext_{kind}.{adapter_name}"] = trained.contiguous()
            if frozen:
                state[f"{name}.prefix_ext_frozen_{kind}.{adapter_name}"] = full[:, :frozen].contiguous()
    runtime.awaiting_weights.discard(adapter_name)
    return state
