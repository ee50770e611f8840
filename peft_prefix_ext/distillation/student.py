"""The student: a short prefix that is trained to answer like the teacher."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.distillation.companions import Companions
from peft_prefix_ext.distillation.context import Context
from peft_prefix_ext.distillation.loss import forward_kl
from peft_prefix_ext.distillation.settings import DistillationSettings
from peft_prefix_ext.distillation.targets import Target
from peft_prefix_ext.distillation.trainer import DistillationTrainer, Divergence, TargetCollator
from peft_prefix_ext.training.checkpoints import last_whole_checkpoint
from peft_prefix_ext.training.processes import needs_cpu, processes
from peft_prefix_ext.training.progress import show_loss_bar
from peft_prefix_ext.tuner.learning_rate import RECOMMENDED

EVALUATIONS_PER_EPOCH = 5
NUM_CHUNKS = 4


def check_length(context: Context, settings: DistillationSettings) -> None:
    """Raises `ValueError` if the context is not longer than the prefix that is to stand for it."""
    p, length = settings.num_virtual_tokens, len(context.token_ids)
    if p >= length:
        raise ValueError(
            f"The context has {length} tokens, no more than the {p} virtual tokens that are to stand for it: use its exact "
            "prefix, `prefix-ext compile`, or fewer virtual tokens."
        )


def make_student(model: PreTrainedModel, context: Context, settings: DistillationSettings, seed: int) -> PeftModel:
    """Returns the model with a prefix that starts from tokens of the context."""
    p = settings.num_virtual_tokens
    ids = context.token_ids if settings.init == "first" else sample_chunks(context.token_ids, p, seed)
    set_seed(seed)
    config = PrefixExtConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=p,
        init="tokens",
        init_token_ids=ids[:p],
        reparam=settings.reparam,
        num_frozen_tokens=min(settings.num_frozen_tokens, p - 1),
        token_dropout=settings.token_dropout,
        context=context.record(),
    )
    return get_peft_model(model, config)


def sample_chunks(token_ids: Sequence[int], number: int, seed: int) -> list[int]:
    """Returns `number` tokens: the first one, and chunks from random places in their order (arXiv 2508.17032)."""
    size = max(1, (number - 1) // NUM_CHUNKS)
    sizes = [size] * ((number - 1) // size)
    sizes[-1:] = [number - 1 - sum(sizes[:-1])] if sizes else []
    # Starts in what is left when all chunks are taken out do not overlap once these are put back.
    free = len(token_ids) - 1 - sum(sizes)
    starts = sorted(random.Random(seed).randint(0, free) for _ in sizes)
    chosen, taken = [token_ids[0]], 1
    for start, length in zip(starts, sizes, strict=True):
        chosen += token_ids[start + taken : start + taken + length]
        taken += length
    return chosen


def train_student(
    student: PeftModel,
    targets: Sequence[Target],
    held_out: Sequence[Target],
    settings: DistillationSettings,
    seed: int,
    folder: Path,
    pad_token_id: int,
    companions: Companions | None = None,
    divergence: Divergence = forward_kl,
    stage: str = "stored",
    **arguments: Any,
) -> float:
    """Trains the student and saves it, and goes on from the last checkpoint of an earlier run.

    Args:
        student: The model with the prefix.
        targets: The teacher's answers.
        held_out: Others, for early stopping.
        settings: The settings.
        seed: The seed of this student.
        folder: Where to save it; checkpoints are in a folder within.
        pad_token_id: The token of the padding.
        companions: The prefixes that it is to stand beside, if any.
        divergence: What is minimized; the held-out questions are scored by `forward_kl` in any case.
        stage: The name of this part of the training, which has checkpoints of its own.
        **arguments: Those of `TrainingArguments` that are to be others.

    Returns:
        The mean divergence from the teacher on the held-out questions.
    """
    steps_per_epoch = max(1, -(-len(targets) // (settings.batch_size * processes(arguments).num_processes)))
    interval = max(1, steps_per_epoch // EVALUATIONS_PER_EPOCH)
    checkpoints = folder / f"checkpoints-{stage}"
    options: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "num_train_epochs": settings.num_epochs,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate or RECOMMENDED[settings.reparam],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "eval_strategy": "steps",
        "eval_steps": interval,
        "save_strategy": "steps",
        "save_steps": interval,
        "save_total_limit": 2,
        "logging_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "prediction_loss_only": True,
        "use_cpu": needs_cpu(),
        "restore_callback_states_from_checkpoint": True,
        "report_to": "none",
        "seed": seed,
    }
    training_arguments = TrainingArguments(**{**options, **arguments})
    if companions is not None and training_arguments.gradient_checkpointing:
        raise ValueError(
            "Companions stand in the cache, which gradient checkpointing leaves out: use one or the other."
        )
    if training_arguments.n_gpu > 1:
        # `Trainer` would copy the model to all of them in each step, and its hooks and caches are of one device.
        training_arguments._n_gpu = 1
    trainer = DistillationTrainer(
        student,
        training_arguments,
        train_dataset=list(targets),
        eval_dataset=list(held_out),
        data_collator=TargetCollator(pad_token_id),
        callbacks=[EarlyStoppingCallback(settings.patience)],
        companions=companions,
        divergence=divergence,
    )
    show_loss_bar(trainer, "divergence")
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(checkpoints))
    loss = float(trainer.evaluate()["eval_loss"])
    if trainer.is_world_process_zero():
        student.save_pretrained(str(folder))
    return loss
