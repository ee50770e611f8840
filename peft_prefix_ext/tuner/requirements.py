"""What a prefix requires of the model, where in the model it goes, and what is saved about the model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterable
from typing import Any

from peft import TaskType
from torch import nn
from transformers import PreTrainedModel

from peft_prefix_ext.architectures.alibi import takes_position_bias
from peft_prefix_ext.architectures.encoder_decoder import supports_prefix_positions
from peft_prefix_ext.base_model.cache_argument import cache_argument
from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.base_model.layers import ProbedLayer, ProbedModel
from peft_prefix_ext.checkpoint.fingerprint import fingerprint
from peft_prefix_ext.checkpoint.format import CROSS, DECODER, ENCODER, FORMAT_VERSION, STATES_VERSION, state_table
from peft_prefix_ext.config import PrefixExtConfig

# The names of the heads that PEFT trains with an adapter, by task type.
HEADS: dict[Any, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def find_decoder(model: PreTrainedModel, probed: ProbedModel, attention: str) -> str:
    """Returns the name of the innermost module around all layers of a kind that takes tokens, positions and the cache.

    The encoder of an encoder-decoder model takes no cache, and both of its stacks compute positions themselves. A model
    without attention needs no positions.
    """
    names = [layer.module for layer in probed.layers if layer.attention == attention]
    names = names or [each.module for each in probed.states]
    name = names[0]
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        parameters = inspect.signature(module.forward).parameters
        holds_all = all(inner.startswith(f"{name}." if name else "") for inner in names)
        takes_input = "input_ids" in parameters and (attention == ENCODER or cache_argument(module))
        if holds_all and takes_input:
            if "position_ids" in parameters or not probed.layers:
                return name
            attention_module = model.get_submodule(names[0])
            if model.config.is_encoder_decoder and supports_prefix_positions(module, attention_module):
                return name
            if not model.config.is_encoder_decoder and takes_position_bias(attention_module):
                return name
    raise ValueError(
        f"{describe(model)} does not take `position_ids` and a cache, which a prefix before its input needs; PREFIX_EXT "
        "does not support it."
    )


def check_attentions(config: PrefixExtConfig, model: PreTrainedModel, layers: list[ProbedLayer]) -> None:
    for attention, field in ((ENCODER, "encoder_prefix"), (CROSS, "cross_prefix")):
        if attention in config.attentions and not any(layer.attention == attention for layer in layers):
            raise ValueError(
                f"`{field}` must be False for {describe(model)}, which has no {attention} attention that can be given "
                "K/V."
            )


def check_task(config: PrefixExtConfig, model: PreTrainedModel) -> None:
    """Checks that the model has what `task_type` and `modules_to_save` ask for; PEFT itself ignores what is missing."""
    name, task_type = type(model).__name__, TaskType(config.task_type).value if config.task_type else None
    if task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM):
        if not hasattr(model, "prepare_inputs_for_generation"):
            raise ValueError(f"`task_type` must not be {task_type} for {name}, which does not generate text.")
        fitting = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
        if task_type != fitting:
            raise ValueError(f"`task_type` must be {fitting.value} for {name}, got {task_type}.")
    modules = [module for module, _ in model.named_modules(remove_duplicate=False)]
    heads = HEADS.get(config.task_type, ())
    # TRL's `RewardTrainer` also asks for `lm_head`, which a classifier lacks, if a chat template adds tokens.
    own = set(config.modules_to_save or ()).difference(*HEADS.values(), ["lm_head"] if heads else [])
    if missing := sorted(name for name in own if not any(module.endswith(name) for module in modules)):
        raise ValueError(f"`modules_to_save` must be modules of {name}, got {missing}.")
    if heads and not own and not any(module.endswith(heads) for module in modules):
        raise ValueError(
            f"`task_type={task_type!r}` trains a head called {' or '.join(map(repr, heads))}, which {name} does not have: load the "
            "model with its head, or name it in `modules_to_save`."
        )


def check_modules_to_save(wanted: Iterable[str] | None, model: nn.Module, hooked: Collection[nn.Module]) -> None:
    """Raises `ValueError` if PEFT would copy modules that contain one of `hooked`: the copies would have no prefix."""
    for name, module in model.named_modules(remove_duplicate=False):
        if name.endswith(tuple(wanted or ())) and any(inner in hooked for inner in module.modules()):
            raise ValueError(
                f"`modules_to_save` must not be modules with a prefix in them, got {sorted(wanted or ())}, of which {name!r} "
                "is one: name modules beside the attention, or its linear layers."
            )


def check_length(config: PrefixExtConfig, model: PreTrainedModel) -> None:
    text_config = model.config.get_text_config(decoder=True)
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit and config.num_virtual_tokens >= limit:
        raise ValueError(
            f"`num_virtual_tokens` must be < the {limit} positions of {type(model).__name__}, got "
            f"{config.num_virtual_tokens}."
        )
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        warnings.warn(
            f"{type(model).__name__} rotates its keys by the length of the text (rope_type={rope['rope_type']!r}): a prefix is "
            "exact only up to the length that its frequencies were computed for.",
            stacklevel=2,
        )


def check_layers_to_train(config: PrefixExtConfig, probed: ProbedModel) -> None:
    indices = sorted({layer.index for layer in probed.layers} | {each.index for each in probed.states})
    if unknown := sorted(set(config.layers_to_train or ()) - set(indices)):
        raise ValueError(f"`layers_to_train` must be among the layers with a prefix, {indices}, got {unknown}.")


def model_record(config: PrefixExtConfig, model: PreTrainedModel, probed: ProbedModel) -> dict[str, Any]:
    """Returns the config fields that describe the model, as they are saved with the adapter."""
    rows = []
    for layer in probed.layers:
        key, value = layer.shapes(config.num_virtual_tokens)
        row = {"index": layer.index, "module": layer.module, "key_shape": key, "value_shape": value}
        rows.append(row if layer.attention == DECODER else {**row, "attention": layer.attention})
    states = {each.index: each.states for each in probed.states}
    return {
        "prefix_layers": rows,
        "prefix_states": state_table(states, {each.index: each.module for each in probed.states}) or None,
        "base_fingerprint": fingerprint(model.config),
        "format_version": STATES_VERSION if states else FORMAT_VERSION,
    }
