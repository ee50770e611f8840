"""Trains small adapters on the processes it is launched on; `test_distributed.py` launches it.

    python distributed.py FOLDER

Leaves, for each of `SETTINGS`, FOLDER/SETTING/alone from a plain loop in one process, and beside it `ddp`, `fsdp2` and `fsdp2-lean`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from peft import PeftModel
from peft.utils.other import fsdp_auto_wrap_policy
from prefixed import with_prefix
from tiny import random_ids, tiny_model
from transformers import Trainer, TrainingArguments

ROWS, BATCH = random_ids(32, 12, seed=4), 8
# Adam divides by the size of a gradient: an epsilon that hides none lets rounding decide over the smallest.
LEARNING_RATE, EPSILON = 0.02, 1e-3

# The adapter, and what gradient checkpointing is told.
SETTINGS: dict[str, tuple[dict, dict | None]] = {
    "flat": ({"num_frozen_tokens": 2}, None),
    "mlp": ({"num_frozen_tokens": 2, "reparam": "mlp"}, None),
    "mlp-of-two-layers": ({"layers_to_train": [0, 2], "reparam": "mlp"}, None),
    "flat-checkpointed": ({}, {"use_reentrant": False}),
    "mlp-checkpointed": ({"reparam": "mlp"}, {"use_reentrant": False}),
    "mlp-reentrant": ({"reparam": "mlp"}, {"use_reentrant": True}),
}


def make(setting: str) -> PeftModel:
    prefix, checkpointing = SETTINGS[setting]
    model = with_prefix(tiny_model("llama"), init_std=0.02, **prefix).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model


def optimizer_of(model: PeftModel) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, eps=EPSILON, weight_decay=0.0)


def train_alone(setting: str, folder: Path) -> None:
    model = make(setting)
    optimizer = optimizer_of(model)
    for batch in ROWS.split(BATCH):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def train_ddp(setting: str, folder: Path) -> None:
    """transformers' `Trainer`, which wraps the model for DDP."""
    settings = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
        per_device_train_batch_size=BATCH // 2,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        adam_epsilon=EPSILON,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        ddp_find_unused_parameters=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    trainer = Trainer(model=make(setting), args=settings, train_dataset=rows)
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    trainer.save_model(str(folder))


def train_fsdp(setting: str, folder: Path, version: int, is_lean: bool = False) -> None:
    """Where it is lean, as by `cpu_ram_efficient_loading`, one process alone has weights to begin with."""
    AcceleratorState._reset_state(reset_partial_state=True)
    # accelerate keeps FSDP for accelerators, torch does not; and FSDP1 takes cpu:0 for another device than cpu.
    process = PartialState(cpu=True)
    process.distributed_type, process.device = DistributedType.FSDP, torch.device("cpu")
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        use_orig_params=True if version == 1 else None,
        reshard_after_forward=True if version == 2 else "FULL_SHARD",
        cpu_ram_efficient_loading=is_lean,
        state_dict_type="FULL_STATE_DICT",
    )
    model = make(setting)
    if is_lean and not accelerator.is_main_process:
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    for batch in ROWS.split(BATCH):
        own = batch[accelerator.process_index :: accelerator.num_processes]
        accelerator.backward(model(input_ids=own, labels=own).loss)
        optimizer.step()
        optimizer.zero_grad()
    state = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        folder, is_main_process=accelerator.is_main_process, state_dict=state
    )


def main(folder: Path) -> None:
    for setting in SETTINGS:
        train_ddp(setting, folder / setting / "ddp")
    for setting in SETTINGS:
        train_fsdp(setting, folder / setting / "fsdp2", version=2)
        train_fsdp(setting, folder / setting / "fsdp2-lean", version=2, is_lean=True)
        if torch.distributed.get_rank() == 0:
            train_alone(setting, folder / setting / "alone")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
