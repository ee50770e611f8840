"""Converts the parameters of a live adapter to the tensors of its checkpoint and back (format: `checkpoint/format.py`).

A reparameterization is saved beside the K/V if `save_reparam` is on: its parameters under the name `REPARAM` (with a suffix
for an encoder, see `LiveStack`), and, if it is residual, the initial K/V that its output is added to, as
`prefix_ext_init_key` and `prefix_ext_init_value` of each layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from peft_prefix_ext.base_model.zero3 import is_partitioned
from peft_prefix_ext.checkpoint.format import ENCODER, LayerKV, is_of_prefix, layer_key, state_key
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook
from peft_prefix_ext.injection.layer import PrefixExtLayer, join_frozen
from peft_prefix_ext.injection.reparam import PrefixMLP
from peft_prefix_ext.injection.state_layer import PrefixStateLayer
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer

WRAPPED = "base_model.model."  # the prefix of the base model's names in a `PeftModel`
REPARAM = f"{WRAPPED}prefix_ext.prefix_ext_reparam"
State = dict[str, torch.Tensor]


class LiveStack(NamedTuple):
    """The parts of an adapter in a decoder or an encoder.

    Args:
        hook_name: The name of the hook in the model's state dict.
        hook: The hook.
        layers: The layers by their names in the state dict.
        state_layers: Those of recurrent layers.
        reparam: The name of the reparameterization in the file.
    """

    hook_name: str
    hook: PrefixDecoderHook
    layers: dict[str, PrefixExtLayer]
    state_layers: dict[str, PrefixStateLayer]
    reparam: str


def find_live(model: nn.Module, adapter_name: str) -> list[LiveStack]:
    """Returns the stacks of a model, in a `PeftModel` or not, that have the adapter."""
    modules = {_without_wrappers(name): module for name, module in model.named_modules()}
    stacks = []
    for hook_name, hook in modules.items():
        if isinstance(hook, PrefixDecoderHook) and adapter_name in hook.num_virtual_tokens:
            layers = {
                name: layer
                for name, layer in modules.items()
                if isinstance(layer, PrefixExtLayer)
                and layer.decoder_hook is hook
                and adapter_name in layer.prefix_ext_key
            }
            state_layers = {
                name: layer
                for name, layer in modules.items()
                if isinstance(layer, PrefixStateLayer)
                and layer.decoder_hook is hook
                and layer.has_adapter(adapter_name)
            }
            is_encoder = any(layer.attention == ENCODER for layer in layers.values())
            stacks.append(LiveStack(hook_name, hook, layers, state_layers, REPARAM + "_encoder" * is_encoder))
    return stacks


def _without_wrappers(name: str) -> str:
    """Removes the wrappers of sharding and checkpointing from a name, as they do in the keys of a state dict."""
    return ".".join(
        part for part in name.split(".") if part not in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    )


def refuse_parts(model: nn.Module, state_dict: State, prefix: str, *args: Any) -> None:
    """Refuses incomplete adapters in `load_state_dict`, as a pre-hook of the model.

    Raises:
        RuntimeError: If the state dict has the trained tensors of an adapter without its constant ones. Those differ between
            runs: an MLP adds to initial K/V that were drawn at random or computed from a text that may have changed.
    """
    given = {_without_wrappers(name.removeprefix(prefix)) for name in state_dict if name.startswith(prefix)}
    trained: dict[str, list[str]] = {}
    constant: dict[str, list[str]] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, PrefixTunerLayer):
            for adapter_name, name, trains in _parts(module):
                by_adapter = trained if trains else constant
                by_adapter.setdefault(adapter_name, []).append(f"{_without_wrappers(module_name)}.{name}")
    for adapter_name, names in constant.items():
        missing = [name for name in names if name not in given]
        if missing and not given.isdisjoint(trained.get(adapter_name, ())):
            raise RuntimeError(
                f"The state dict has what adapter {adapter_name!r} trains, but not what that goes with ({missing[0]}, one of "
                f"{len(missing)}): save the model's buffers, too, or use `save_pretrained`."
            )


def _parts(module: PrefixTunerLayer) -> Iterator[tuple[str, str, bool]]:
    """Yields `(adapter name, tensor name, whether it trains)` for each tensor of a layer or hook that can have any value."""
    for container in module.adapter_layer_names + module.other_param_names:
        for adapter_name, part in getattr(module, container).items():
            if isinstance(part, nn.Module):
                yield from ((adapter_name, f"{container}.{adapter_name}.{name}", True) for name in part.state_dict())
                continue
            is_zero = container in module.adapter_layer_names and _has_full_mlp(module, adapter_name)
            if not is_zero:
                yield adapter_name, f"{container}.{adapter_name}", isinstance(part, nn.Parameter)


def _has_full_mlp(module: Any, adapter_name: str) -> bool:
    """Whether the K/V of a layer are the output of an MLP, and not a sum with it."""
    hook = module.decoder_hook
    mlp = hook.prefix_ext_reparam[adapter_name] if adapter_name in hook.prefix_ext_reparam else None
    return mlp is not None and not mlp.is_residual and module.module_name in hook.layer_names[adapter_name]


@torch.no_grad()
def to_checkpoint(model: nn.Module, config: PrefixExtConfig, adapter_name: str, state: State) -> State:
    """Returns the checkpoint of an adapter.

    Args:
        model: The model, in a `PeftModel` or not.
        config: The config of the adapter.
        adapter_name: The name of the adapter.
        state: The state dict of `model`; empty in the processes of a sharded model that do not save.

    Raises:
        ValueError: If the parameters are spread over processes and were not gathered.
    """
    saved: State = {}
    if not state:
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
    for row in config._saved_fields.get("prefix_states") or []:
        row["dtype"] = str(saved[state_key(row["module"], row["kind"], row["number"])].dtype).removeprefix("torch.")
    return saved


def _to_checkpoint(stack: LiveStack, config: PrefixExtConfig, adapter_name: str, state: State) -> State:
    hook_name, hook, layers, state_layers, reparam = stack
    saved: State = {}
    residuals: dict[str, LayerKV] = {}
    if adapter_name in hook.prefix_ext_reparam:
        mlp: Any = hook.prefix_ext_reparam[adapter_name]
        parameters = {name: state[f"{hook_name}.prefix_ext_reparam.{adapter_name}.{name}"] for name in mlp.state_dict()}
        outputs = mlp.evaluate(config, parameters)
        residuals = dict(zip(hook.layer_names[adapter_name], outputs, strict=True))
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
    for name, state_layer in state_layers.items():
        for tensor_name, (kind, number) in zip(state_layer.adapter_layer_names, state_layer.states, strict=True):
            full = state[f"{name}.{tensor_name}.{adapter_name}"] * state_layer.gains[adapter_name]
            saved[state_key(state_layer.module_name, kind, number)] = full
            state_layer.check_loaded(adapter_name, full)
    return saved


def from_checkpoint(model: nn.Module, config: PrefixExtConfig, adapter_name: str, saved: State) -> State:
    """Converts a checkpoint to a state dict of `model`; tensors that are not of the prefix stay as they are.

    Raises:
        ValueError: If the checkpoint lacks a layer, or has other shapes than the adapter.
    """
    state = {name: tensor for name, tensor in saved.items() if not is_of_prefix(name)}
    for stack in find_live(model, adapter_name):
        state |= _from_checkpoint(stack, config, adapter_name, saved)
    return state


def _from_checkpoint(stack: LiveStack, config: PrefixExtConfig, adapter_name: str, saved: State) -> State:
    hook_name, hook, layers, state_layers, reparam = stack
    state: State = {}
    frozen, starts = {}, {}
    for layer in layers.values():
        full = _full_kv(layer, config, adapter_name, saved)
        num_frozen = config.num_virtual_tokens - layer.prefix_ext_key[adapter_name].shape[1]
        frozen[layer.module_name] = LayerKV(*(kv[:, :num_frozen].contiguous() for kv in full)) if num_frozen else None
        starts[layer.module_name] = LayerKV(*(kv[:, num_frozen:].contiguous() for kv in full))
    if adapter_name in hook.prefix_ext_reparam:
        mlp: Any = hook.prefix_ext_reparam[adapter_name]
        trained = {name: starts[name] for name in hook.layer_names[adapter_name]}
        parameters, added_to = _resume(mlp, config, trained, adapter_name, saved, reparam)
        state |= {f"{hook_name}.prefix_ext_reparam.{adapter_name}.{name}": parameters[name] for name in parameters}
        starts |= added_to
    for name, layer in layers.items():
        for number, kind in enumerate(LayerKV._fields):
            state[f"{name}.prefix_ext_{kind}.{adapter_name}"] = starts[layer.module_name][number]
            if (frozen_kv := frozen[layer.module_name]) is not None:
                state[f"{name}.prefix_ext_frozen_{kind}.{adapter_name}"] = frozen_kv[number]
    for name, state_layer in state_layers.items():
        for tensor_name, (kind, number) in zip(state_layer.adapter_layer_names, state_layer.states, strict=True):
            like = getattr(state_layer, tensor_name)[adapter_name]
            tensor = _checked(
                saved.get(state_key(state_layer.module_name, kind, number)),
                list(like.shape),
                adapter_name,
                f"{kind} state {number} of layer {state_layer.index}",
            )
            state[f"{name}.{tensor_name}.{adapter_name}"] = tensor / state_layer.gains[adapter_name]
    return state


def _full_kv(layer: PrefixExtLayer, config: PrefixExtConfig, adapter_name: str, saved: State) -> LayerKV:
    """Returns the K/V of a layer in a checkpoint, `[num_kv_heads, num_virtual_tokens, head_dim]` each."""
    states = []
    for kind in LayerKV._fields:
        num_heads, _, head_dim = getattr(layer, f"prefix_ext_{kind}")[adapter_name].shape
        expected = [num_heads, config.num_virtual_tokens, head_dim]
        full = saved.get(layer_key(layer.module_name, kind))
        states.append(_checked(full, expected, adapter_name, f"{kind} of layer {layer.index}"))
    return LayerKV(*states)


def _checked(tensor: torch.Tensor | None, expected: list[int], adapter_name: str, what: str) -> torch.Tensor:
    if tensor is None or list(tensor.shape) != expected:
        found = "nothing" if tensor is None else list(tensor.shape)
        raise ValueError(f"The checkpoint of adapter {adapter_name!r} has {found} for the {what}, expected {expected}.")
    return tensor


def _resume(
    mlp: PrefixMLP,
    config: PrefixExtConfig,
    trained: dict[str, LayerKV],
    adapter_name: str,
    saved: State,
    reparam: str,
) -> tuple[State, dict[str, LayerKV]]:
    """Returns the parameters of a reparameterization and the K/V that it adds to, by attention module.

    Args:
        mlp: The reparameterization, for its shapes.
        config: The config of the adapter.
        trained: The K/V that it was saved with, by attention module.
        adapter_name: The name of the adapter.
        saved: The checkpoint.
        reparam: The name of the reparameterization in the checkpoint.
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
        "other settings): its K/V are kept, and training continues from them with a new one.",
        stacklevel=2,
    )
    new = PrefixMLP(config, [(list(kv.key.shape), list(kv.value.shape)) for kv in trained.values()])
    new.to(mlp.latent.dtype).start_at(list(trained.values()))
    return new.state_dict(), trained if mlp.is_residual else zeros
