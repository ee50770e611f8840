"""Between the parameters of a live adapter and the tensors of its checkpoint (see `checkpoint.py` for the format).

Saved beside the K/V when there is a reparameterization and `save_reparam` is on: its own parameters under `REPARAM` (an
encoder's under that name of its own, see `LiveStack`), and what it adds to, as `prefix_ext_init_key` and
`prefix_ext_init_value` of each layer, unless it yields the K/V by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from peft_prefix_ext.base_model.zero3 import is_partitioned
from peft_prefix_ext.checkpoint.format import ENCODER, LayerKV, is_of_prefix, layer_key
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook
from peft_prefix_ext.injection.layer import PrefixExtLayer, join_frozen
from peft_prefix_ext.injection.reparam import PrefixMLP
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer

WRAPPED = "base_model.model."  # what `PeftModel` and a tuner add to the names of the model within
REPARAM = f"{WRAPPED}prefix_ext.prefix_ext_reparam"
State = dict[str, torch.Tensor]


class LiveStack(NamedTuple):
    """Where the parts of an adapter are within a decoder or an encoder, by their names in the model's state dict.

    Its reparameterization is on disk under `reparam`.
    """

    runtime_name: str
    runtime: PrefixDecoderHook
    layers: dict[str, PrefixExtLayer]
    reparam: str


def find_live(model: nn.Module, adapter_name: str) -> list[LiveStack]:
    """Finds the stacks in which a model has an adapter, wrapped in a `PeftModel` or not."""
    modules = {_without_wrappers(name): module for name, module in model.named_modules()}
    stacks = []
    for runtime_name, runtime in modules.items():
        if isinstance(runtime, PrefixDecoderHook) and adapter_name in runtime.num_virtual_tokens:
            layers = {
                name: layer
                for name, layer in modules.items()
                if isinstance(layer, PrefixExtLayer)
                and layer.decoder_hook is runtime
                and adapter_name in layer.prefix_ext_key
            }
            is_encoder = any(layer.attention == ENCODER for layer in layers.values())
            stacks.append(LiveStack(runtime_name, runtime, layers, REPARAM + "_encoder" * is_encoder))
    return stacks


def _without_wrappers(name: str) -> str:
    """Takes out what sharding and checkpointing wrap around a module, which they leave out of a state dict's keys too."""
    return ".".join(
        part for part in name.split(".") if part not in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    )


def refuse_parts(model: nn.Module, state_dict: State, prefix: str, *args: Any) -> None:
    """Looks at what `load_state_dict` is about to bring, at `prefix`, before it does.

    Raises:
        RuntimeError: If it is what an adapter trains, without what stays as it is: what an MLP adds to was drawn at random, or
            read off a text that may have changed, and what another training run starts from is something else.
    """
    given = {_without_wrappers(name.removeprefix(prefix)) for name in state_dict if name.startswith(prefix)}
    trained: dict[str, list[str]] = {}
    kept: dict[str, list[str]] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, PrefixTunerLayer):
            for adapter_name, name, trains in _parts(module):
                by_adapter = trained if trains else kept
                by_adapter.setdefault(adapter_name, []).append(f"{_without_wrappers(module_name)}.{name}")
    for adapter_name, names in kept.items():
        missing = [name for name in names if name not in given]
        if missing and not given.isdisjoint(trained.get(adapter_name, ())):
            raise RuntimeError(
                f"The state dict has what adapter {adapter_name!r} trains, but not what that goes with ({missing[0]}, one of "
                f"{len(missing)}): save the model's buffers, too, or use `save_pretrained`."
            )


def _parts(module: PrefixTunerLayer) -> Iterator[tuple[str, str, bool]]:
    """Yields the adapter and the name of each tensor of a layer or runtime that is not known beforehand; whether it trains."""
    for container in module.adapter_layer_names + module.other_param_names:
        for adapter_name, part in getattr(module, container).items():
            if isinstance(part, nn.Module):
                yield from ((adapter_name, f"{container}.{adapter_name}.{name}", True) for name in part.state_dict())
                continue
            is_zero = container in module.adapter_layer_names and _is_yielded(module, adapter_name)
            if not is_zero:
                yield adapter_name, f"{container}.{adapter_name}", isinstance(part, nn.Parameter)


def _is_yielded(module: Any, adapter_name: str) -> bool:
    """Whether an MLP yields the K/V of a layer all by itself."""
    runtime = module.decoder_hook
    mlp = runtime.prefix_ext_reparam[adapter_name] if adapter_name in runtime.prefix_ext_reparam else None
    return mlp is not None and not mlp.is_residual and module.module_name in runtime.layer_names[adapter_name]


@torch.no_grad()
def to_checkpoint(model: nn.Module, config: PrefixExtConfig, adapter_name: str, state: State) -> State:
    """Returns the checkpoint of an adapter whose parameters are in `state`, a state dict of `model`."""
    saved: State = {}
    if not state:  # of a sharded model, which one process saves and the others call with nothing
        return saved
    if any(is_partitioned(parameter) for parameter in model.parameters()) and not all(
        tensor.numel()
        for name, tensor in state.items()
        if name.endswith(f".{adapter_name}") or f".{adapter_name}." in name
    ):
        raise ValueError(
            f"The parameters of adapter {adapter_name!r} are spread over processes (DeepSpeed ZeRO-3): save it with "
            "`Trainer.save_model`, or give `save_pretrained` the `state_dict` that `accelerator.get_state_dict(model)` gathers."
        )
    for stack in find_live(model, adapter_name):
        saved |= _to_checkpoint(stack, config, adapter_name, state)
    return saved


def _to_checkpoint(stack: LiveStack, config: PrefixExtConfig, adapter_name: str, state: State) -> State:
    runtime_name, runtime, layers, reparam = stack
    saved: State = {}
    residuals: dict[str, LayerKV] = {}
    if adapter_name in runtime.prefix_ext_reparam:
        mlp: Any = runtime.prefix_ext_reparam[adapter_name]
        parameters = {
            name: state[f"{runtime_name}.prefix_ext_reparam.{adapter_name}.{name}"] for name in mlp.state_dict()
        }
        outputs = mlp.evaluate(config, parameters)
        residuals = dict(zip(runtime.layer_names[adapter_name], outputs, strict=True))
        if config.save_reparam:
            saved |= {f"{reparam}.{name}": tensor for name, tensor in parameters.items()}
    for name, layer in layers.items():
        for number, kind in enumerate(LayerKV._fields):
            frozen = state.get(f"{name}.prefix_ext_frozen_{kind}.{adapter_name}")
            trained = state[f"{name}.prefix_ext_{kind}.{adapter_name}"]
            residual = residuals.get(layer.module_name)
            full = trained if residual is None else trained + residual[number].to(trained.device)
            saved[layer_key(layer.module_name, kind)] = full = join_frozen(frozen, full)
            layer.check_loaded(adapter_name, full)
            if residual is not None and config.save_reparam and config.reparam_residual:
                saved[layer_key(layer.module_name, f"init_{kind}")] = trained
    return saved


def from_checkpoint(model: nn.Module, config: PrefixExtConfig, adapter_name: str, saved: State) -> State:
    """Returns the part of a state dict of `model` that `saved`, a checkpoint, gives an adapter; keeps other tensors.

    Raises:
        ValueError: If the checkpoint lacks a layer, or has other shapes than the adapter.
    """
    state = {name: tensor for name, tensor in saved.items() if not is_of_prefix(name)}
    for stack in find_live(model, adapter_name):
        state |= _from_checkpoint(stack, config, adapter_name, saved)
    return state


def _from_checkpoint(stack: LiveStack, config: PrefixExtConfig, adapter_name: str, saved: State) -> State:
    runtime_name, runtime, layers, reparam = stack
    state: State = {}
    frozen, starts = {}, {}
    for layer in layers.values():
        full = _full_kv(layer, config, adapter_name, saved)
        num_frozen = config.num_virtual_tokens - layer.prefix_ext_key[adapter_name].shape[1]
        frozen[layer.module_name] = LayerKV(*(kv[:, :num_frozen].contiguous() for kv in full)) if num_frozen else None
        starts[layer.module_name] = LayerKV(*(kv[:, num_frozen:].contiguous() for kv in full))
    if adapter_name in runtime.prefix_ext_reparam:
        mlp: Any = runtime.prefix_ext_reparam[adapter_name]
        trained = {name: starts[name] for name in runtime.layer_names[adapter_name]}
        parameters, added_to = _resume(mlp, config, trained, adapter_name, saved, reparam)
        state |= {f"{runtime_name}.prefix_ext_reparam.{adapter_name}.{name}": parameters[name] for name in parameters}
        starts |= added_to
    for name, layer in layers.items():
        for number, kind in enumerate(LayerKV._fields):
            state[f"{name}.prefix_ext_{kind}.{adapter_name}"] = starts[layer.module_name][number]
            if (kept := frozen[layer.module_name]) is not None:
                state[f"{name}.prefix_ext_frozen_{kind}.{adapter_name}"] = kept[number]
    return state


def _full_kv(layer: PrefixExtLayer, config: PrefixExtConfig, adapter_name: str, saved: State) -> LayerKV:
    """Returns the K/V of a layer in a checkpoint, `[num_kv_heads, num_virtual_tokens, head_dim]` each."""
    states = []
    for kind in LayerKV._fields:
        num_heads, _, head_dim = getattr(layer, f"prefix_ext_{kind}")[adapter_name].shape
        expected = [num_heads, config.num_virtual_tokens, head_dim]
        full = saved.get(layer_key(layer.module_name, kind))
        if full is None or list(full.shape) != expected:
            found = "nothing" if full is None else list(full.shape)
            raise ValueError(
                f"The checkpoint of adapter {adapter_name!r} has {found} for the {kind} of layer {layer.index}, "
                f"expected {expected}."
            )
        states.append(full)
    return LayerKV(*states)


def _resume(
    mlp: PrefixMLP,
    config: PrefixExtConfig,
    trained: dict[str, LayerKV],
    adapter_name: str,
    saved: State,
    reparam: str,
) -> tuple[State, dict[str, LayerKV]]:
    """Returns the parameters that a reparameterization goes on with, and what it adds to, by attention module.

    Args:
        mlp: The reparameterization, whose values do not matter.
        config: The config of the adapter.
        trained: The K/V that it yielded, by attention module.
        adapter_name: The name of the adapter.
        saved: The checkpoint.
        reparam: What its parameters are called there.
    """
    zeros = {name: LayerKV(*(torch.zeros_like(state) for state in kv)) for name, kv in trained.items()}
    init_keys = {name: [layer_key(name, f"init_{kind}") for kind in LayerKV._fields] for name in trained}
    has_init = [key in saved for keys in init_keys.values() for key in keys]
    shapes = {name: saved[f"{reparam}.{name}"].shape for name in mlp.state_dict() if f"{reparam}.{name}" in saved}
    same_form = all(has_init) if mlp.is_residual else not any(has_init)
    if same_form and shapes == {name: tensor.shape for name, tensor in mlp.state_dict().items()}:
        parameters = {name: saved[f"{reparam}.{name}"] for name in mlp.state_dict()}
        added_to = {name: LayerKV(*(saved[key] for key in keys)) for name, keys in init_keys.items() if mlp.is_residual}
        return parameters, zeros | added_to
    warnings.warn(
        f"The checkpoint of adapter {adapter_name!r} has no reparameterization of this form (`save_reparam=False`, or "
        "other settings): its K/V are kept, and training goes on from them with a new one.",
        stacklevel=2,
    )
    new = PrefixMLP(config, [(list(kv.key.shape), list(kv.value.shape)) for kv in trained.values()])
    new.to(mlp.latent.dtype).start_at(list(trained.values()))
    return new.state_dict(), trained if mlp.is_residual else zeros
