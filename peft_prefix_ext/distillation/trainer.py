"""`DistillationTrainer`: a `Trainer` that brings a student's distribution to that of stored targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from peft_prefix_ext.distillation.companions import Companions
from peft_prefix_ext.distillation.loss import forward_kl
from peft_prefix_ext.distillation.targets import Target
from peft_prefix_ext.generation.batching import IGNORED, answer_logits, pad_answers

Divergence = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TargetCollator:
    """Makes a batch of targets.

    Besides what `pad_answers` returns there are `target_ids` and `target_logprobs`, `[b, n, k]`.

    Args:
        pad_token_id: The token of the padding.
    """

    pad_token_id: int

    def __call__(self, targets: Sequence[Target]) -> dict[str, torch.Tensor]:
        batch = pad_answers(
            [target.prompt_ids for target in targets], [target.answer_ids for target in targets], self.pad_token_id
        )
        is_answer = batch["labels"] != IGNORED
        shape = (*is_answer.shape, len(targets[0].top_ids[0]))
        # The name under which `Trainer` counts labels that are aligned with the logits already.
        batch["shift_labels"] = batch["labels"]
        batch["target_ids"] = torch.zeros(shape, dtype=torch.long)
        batch["target_logprobs"] = torch.zeros(shape)
        for row, target in enumerate(targets):
            batch["target_ids"][row, is_answer[row]] = torch.tensor(target.top_ids)
            batch["target_logprobs"][row, is_answer[row]] = torch.tensor(target.top_logprobs)
        return batch


class DistillationTrainer(Trainer):
    """Trains on the mean divergence per token of an answer, whatever the number of devices and of accumulated batches.

    Everything else is the `Trainer` of transformers: schedules, checkpoints, callbacks, mixed precision, several processes.

    Args:
        divergence: `forward_kl`, or `reverse_kl` for answers of the student's own.
        companions: The prefixes that the student is to stand beside, if any.
        *args: Those of `Trainer`; datasets are lists of `Target`.
        **kwargs: The same.
    """

    def __init__(
        self, *args: Any, divergence: Divergence = forward_kl, companions: Companions | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.divergence = divergence
        self.companions = companions
        # So that losses are divided by the number of tokens in all accumulated batches, instead of averaged over batches.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        is_answer = inputs["labels"] != IGNORED
        cache = self.companions.draw(len(is_answer)) if self.companions and model.training else None
        # Only logits that are compared become float32 tensors of the size of the vocabulary.
        logits = answer_logits(model, inputs, cache)[is_answer]
        # Held-out answers are the teacher's, whatever is trained on.
        divergence = self.divergence if model.training else forward_kl
        loss = divergence(logits, inputs["target_ids"][is_answer], inputs["target_logprobs"][is_answer]).sum()
        loss = loss / (is_answer.sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # which the gradients are averaged over
        return (loss, {}) if return_outputs else loss
