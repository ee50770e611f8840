"""Whether the recurrent layers of a model start from states that they are given, found by running each mixer alone.

Mamba-1 mixers ignore the state of their cache when they read several tokens. Their states cannot train.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.base_model.layers import ProbedModel, eval_mode, probe_model
from peft_prefix_ext.base_model.offloaded import input_device
from peft_prefix_ext.base_model.states import ProbedState, map_states
from peft_prefix_ext.base_model.tensor_parallel import tensor_parallel_mesh
from peft_prefix_ext.checkpoint.format import LayerState
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.injection.decoder_hook import without_prefixes
from peft_prefix_ext.injection.state_layer import mixer_arguments
from peft_prefix_ext.injection.state_view import PrefixStateView

NUM_TOKENS = 3


def trainable_states(config: PrefixExtConfig, model: PreTrainedModel, probed: ProbedModel) -> list[ProbedState]:
    """Returns the recurrent layers that get a prefix: all or, with a warning if the config asks for them, none.

    Raises:
        ValueError: If the model has no other layers, or its recurrent layers are sharded over processes.
    """
    wanted = bool(probed.states) and config.state_prefix
    if wanted:
        _refuse_sharded(model, probed.states)
    supported = wanted and _start_from_states(model, probed.states)
    if not probed.layers and not supported:
        reason = "its recurrent layers do not start from given states" if wanted else "`state_prefix` is False"
        raise ValueError(f"{describe(model)} has no attention layer to give a prefix to, and {reason}.")
    if not wanted:
        return []
    if not supported:
        warnings.warn(
            f"The recurrent layers of {describe(model)} do not start from states that they are given, so only its attention "
            "layers have a prefix, and the prefix of a text is not the text.",
            stacklevel=2,
        )
        return []
    return probed.states


def check_prefix_can_be_text(model: PreTrainedModel) -> None:
    """Raises `ValueError` if the prefix of a text would not be the text, since recurrent layers cannot have a prefix."""
    with without_prefixes(model):
        probed = probe_model(model)
        inexact = bool(probed.layers and probed.states) and not _start_from_states(model, probed.states)
    if inexact:
        raise ValueError(
            f"The recurrent layers of {describe(model)} do not start from states that they are given, so the prefix of a text "
            "is not the text: train a prefix instead."
        )


def _refuse_sharded(model: PreTrainedModel, states: list[ProbedState]) -> None:
    if tensor_parallel_mesh(model) is None:
        return
    for each in states:
        weights = model.get_submodule(each.module).parameters()
        if any(isinstance(weight, DTensor) and not weight.placements[-1].is_replicate() for weight in weights):
            raise ValueError(
                f"{describe(model)} shards its recurrent layers over processes, where states cannot be trained: use "
                "`state_prefix=False`, or load it without tensor parallelism."
            )


@torch.no_grad()
def _start_from_states(model: PreTrainedModel, states: list[ProbedState]) -> bool:
    """Whether each state that a mixer is given changes its output for a few tokens, but not a convolution's oldest input."""
    calls: dict[str, dict[str, Any]] = {}
    with ExitStack() as hooks, eval_mode(model):
        for each in states:
            mixer = model.get_submodule(each.module)
            hooks.callback(_keep_arguments(mixer, calls, each.module).remove)
        ids = torch.arange(NUM_TOKENS, device=input_device(model))[None]
        model(input_ids=ids, use_cache=False)
        hooks.close()
        try:
            return all(_starts_from(model.get_submodule(each.module), calls[each.module], each) for each in states)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # it asks for more than a cache's states


def _keep_arguments(mixer: nn.Module, calls: dict[str, dict[str, Any]], name: str) -> RemovableHandle:
    names, _ = mixer_arguments(mixer)

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls[name] = {**dict(zip(names, args, strict=False)), **kwargs}

    return mixer.register_forward_pre_hook(keep, with_kwargs=True)


def _starts_from(mixer: nn.Module, arguments: dict[str, Any], probed: ProbedState) -> bool:
    _, cache_name = mixer_arguments(mixer)
    start = map_states(probed.states, lambda tensor: torch.zeros_like(tensor)[None])

    def run(states: LayerState, oldest: float = 0.0) -> torch.Tensor:
        view = PrefixStateView(None, probed.index, map_states(states, torch.clone))
        for state in view.conv_states.values():
            state[..., 0] = oldest
        output: torch.Tensor = mixer(**{**arguments, cache_name: view})
        return output

    before = run(start)
    if not torch.equal(run(start, oldest=1.0), before):
        return False
    for kind, number, state in start.numbered():
        changed = [*getattr(start, kind)]
        changed[number] = torch.ones_like(state)
        if torch.equal(run(start._replace(**{kind: tuple(changed)})), before):
            return False
    return True
