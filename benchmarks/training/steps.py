"""One training step of each method, all on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common.shapes import SHAPES
from peft_prefix_ext import PrefixExtConfig

LIMIT, STOCK_FLAT, STOCK_MLP = "limit", "PEFT prefix tuning, flat", "PEFT prefix tuning, MLP"
LEARNING_RATE = 1e-4  # small, so that the cost of a step does not depend on the steps before it


@dataclass(frozen=True)
class Method:
    """A training method.

    Args:
        make_config: Returns the PEFT config for a number of virtual tokens; None for the limit, which trains nothing.
        checkpointing: Whether to use gradient checkpointing. Stock PEFT refuses it with prefix tuning, whose prefix is in
            the model's cache.
    """

    make_config: Callable[[int], PeftConfig] | None = None
    checkpointing: bool = False


def _ours(reparam: str, checkpointing: bool = False) -> Method:
    return Method(
        lambda p: PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=p, reparam=reparam, init="random"),
        checkpointing,
    )


def _stock(projection: bool) -> Method:
    return Method(
        lambda p: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p, prefix_projection=projection)
    )


def _lora(rank: int) -> Method:
    return Method(lambda p: LoraConfig(task_type="CAUSAL_LM", r=rank))


# Library defaults throughout, such as the widths of both MLPs and the target modules of LoRA.
METHODS = {
    LIMIT: Method(),
    "ours, flat": _ours("none"),
    "ours, MLP": _ours("mlp"),
    "ours, flat, checkpointing": _ours("none", checkpointing=True),
    "ours, MLP, checkpointing": _ours("mlp", checkpointing=True),
    STOCK_FLAT: _stock(projection=False),
    STOCK_MLP: _stock(projection=True),
    "LoRA, rank 8": _lora(8),
    "LoRA, rank 16": _lora(16),
}


class TrainingStep:
    """A method on a model, with its optimizer.

    The limit is the frozen model's forward pass and the gradient of its input: no method that trains in front of or inside
    all layers can do with less.

    Args:
        base: The model. It does not change; its weights are shared, not copied.
        method: The method.
        num_virtual_tokens: The length of a prefix.
        compiled: Whether `torch.compile` runs the model.
    """

    def __init__(self, base: PreTrainedModel, method: Method, num_virtual_tokens: int, compiled: bool = False) -> None:
        model = share_weights(base).requires_grad_(False)
        self.model = (
            model if method.make_config is None else get_peft_model(model, method.make_config(num_virtual_tokens))
        )
        if method.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        self._run: Callable[..., Any] = torch.compile(self.model) if compiled else self.model
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE) if self.trained else None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the mean language modeling loss of `input_ids`, `[batch, length]`."""
        mask = torch.ones_like(input_ids)  # data collators add a mask even without padding
        if self.trained:
            return self._run(input_ids=input_ids, attention_mask=mask, labels=input_ids, use_cache=False).loss
        embeddings = self.model.get_input_embeddings()(input_ids).requires_grad_()
        return self._run(inputs_embeds=embeddings, attention_mask=mask, labels=input_ids, use_cache=False).loss

    def update(self, loss: torch.Tensor) -> None:
        """Runs the backward pass and the optimizer step."""
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of the model's modules that shares its parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def load(
    model: str, dtype: torch.dtype, device: torch.device, num_layers: int | None, attention: str | None = None
) -> PreTrainedModel:
    """Loads the base model.

    Args:
        model: A Hub id, a folder, or one of `SHAPES`, for random weights.
        dtype: The data type of the weights.
        device: Where to load it.
        num_layers: The number of layers to use; None for all.
        attention: transformers' `attn_implementation`; None for its default.
    """
    fewer = {} if num_layers is None else {"num_hidden_layers": num_layers}
    how = {} if attention is None else {"attn_implementation": attention}
    if model not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device, **how, **fewer)
    torch.manual_seed(0)
    config = copy.deepcopy(SHAPES[model])
    config.update(fewer)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **how)
