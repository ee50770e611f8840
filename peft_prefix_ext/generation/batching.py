"""Batches of prompts with answers, and the logits that predict the answers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache

from peft_prefix_ext.base_model.cache_argument import cache_argument
from peft_prefix_ext.generation.generator import TokenIds

IGNORED = -100  # the label of what is no token of an answer


def pad_answers(prompts: Sequence[TokenIds], answers: Sequence[TokenIds], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Returns prompts and answers behind one another, padded on the right.

    Returns:
        `input_ids` and `attention_mask`, `[b, length]`; `labels`, `[b, n]`, of the n columns in which any row has its answer;
        `predicting`, `[n]`, the columns before these, whose logits predict them.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full((len(rows), length), IGNORED)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        input_ids[index, : len(row)] = torch.tensor(row)
        attention_mask[index, : len(row)] = 1
        labels[index, len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
    columns = (labels != IGNORED).any(dim=0).nonzero()[:, 0]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels[:, columns],
        "predicting": columns - 1,
    }


def answer_logits(model: nn.Module, batch: Mapping[str, torch.Tensor], cache: Cache | None = None) -> torch.Tensor:
    """Returns the logits that predict `labels`, `[b, n, vocab_size]`, of a batch from `pad_answers`.

    Others are not computed, where the model can leave them out: with a large vocabulary they take more time and memory than
    all else.

    Args:
        model: The model, in whatever wrapper.
        batch: The batch.
        cache: The cache of tokens that stand before it, `None` if there are none.
    """
    base = _innermost(model)
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if cache is not None:
        inputs["attention_mask"] = functional.pad(inputs["attention_mask"], (cache.get_seq_length(), 0), value=1)
        inputs[cache_argument(base) or "past_key_values"] = cache
    can_leave_out = "logits_to_keep" in inspect.signature(base.forward).parameters
    if can_leave_out:
        inputs["logits_to_keep"] = batch["predicting"]
    logits: torch.Tensor = model(**inputs, use_cache=cache is not None).logits
    return logits if can_leave_out else logits[:, batch["predicting"]]


def _innermost(model: Any) -> nn.Module:
    """Returns the model of transformers within wrappers such as DDP and PEFT."""
    while hasattr(model, "module"):
        model = model.module
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base
