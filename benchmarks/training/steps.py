"""One training step of each method that the training benchmark compares, all on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common.shapes import SHAPES
from peft_prefix_ext import PrefixExtConfig

LIMIT, STOCK_FLAT, STOCK_MLP = "limit", "PEFT prefix tuning, flat", "PEFT prefix tuning, MLP"
LEARNING_RATE = 1e-4  # small: what a step costs must not depend on how many there were


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        make_config: Returns its config for a number of virtual tokens; `None` for the limit, which trains nothing.
        checkpointing: Whether the model's layers are checkpointed. Stock PEFT refuses to: a prefix in the model's cache
            is lost there.
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


# Each as its library has it by default: the widths of both MLPs, the modules that LoRA is put on.
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
    """A method on a model, and its optimizer.

    The limit of what any method can do that trains in front of, or within, all layers is the frozen model's forward pass
    and the gradient of its input.

    Args:
        base: The model, which stays as it is; its weights are shared, not copied.
        method: The method.
        num_virtual_tokens: How long a prefix is.
    """

    def __init__(self, base: PreTrainedModel, method: Method, num_virtual_tokens: int) -> None:
        model = share_weights(base).requires_grad_(False)
        self.model = (
            model if method.make_config is None else get_peft_model(model, method.make_config(num_virtual_tokens))
        )
        if method.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE) if self.trained else None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss of every token of `input_ids`, `[batch, length]`, but the first."""
        mask = torch.ones_like(input_ids)  # as collators make it, also where there is no padding
        if self.trained:
            return self.model(input_ids=input_ids, attention_mask=mask, labels=input_ids, use_cache=False).loss
        embeddings = self.model.get_input_embeddings()(input_ids).requires_grad_()
        return self.model(inputs_embeds=embeddings, attention_mask=mask, labels=input_ids, use_cache=False).loss

    def update(self, loss: torch.Tensor) -> None:
        """Backward pass and optimizer."""
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of the model with the same parameters and buffers, so that modules can be put into it."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def load(model: str, dtype: torch.dtype, device: torch.device, num_layers: int | None) -> PreTrainedModel:
    """Returns the model to train.

    Args:
        model: A folder, a name on the Hub, or one of `SHAPES`, whose weights are random then.
        num_layers: How many of its layers there shall be; `None` for all.
    """
    fewer = {} if num_layers is None else {"num_hidden_layers": num_layers}
    if model not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device, **fewer)
    torch.manual_seed(0)
    config = copy.deepcopy(SHAPES[model])
    config.update(fewer)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
