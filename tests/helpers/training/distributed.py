"""Trains small adapters in several processes; launched by `test_distributed.py`.

    python distributed.py FOLDER

Leaves, for each of `SETTINGS`, FOLDER/SETTING/alone from a plain loop in one process, and beside it `ddp`, `fsdp1`, `fsdp2` and
`fsdp2-lean`.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from peft import PeftModel
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import Trainer, TrainingArguments

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model

ROWS, BATCH = random_ids(32, 12, seed=4), 8
# Adam divides by the size of a gradient: an epsilon that hides none lets rounding decide over the smallest.
LEARNING_RATE, EPSILON = 0.02, 1e-3

# The model, the adapter, and what gradient checkpointing is told. The hybrids' recurrent layers train their states.
SETTINGS: dict[str, tuple[str, dict, dict | None]] = {
    "flat": ("llama", {"num_frozen_tokens": 2}, None),
    "mlp": ("llama", {"num_frozen_tokens": 2, "reparam": "mlp"}, None),
    "mlp-of-two-layers": ("llama", {"layers_to_train": [0, 2], "reparam": "mlp"}, None),
    "flat-checkpointed": ("llama", {}, {"use_reentrant": False}),
    "mlp-checkpointed": ("llama", {"reparam": "mlp"}, {"use_reentrant": False}),
    "mlp-reentrant": ("llama", {"reparam": "mlp"}, {"use_reentrant": True}),
    "states-of-mamba": ("bamba", {}, None),
    "states-of-delta-nets": ("qwen3_next", {"reparam": "mlp"}, {"use_reentrant": False}),
}


def make(setting: str) -> PeftModel:
    name, prefix, checkpointing = SETTINGS[setting]
    model = with_prefix(tiny_model(name), init_std=0.02, **prefix).train()
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


def train_fsdp1(setting: str, folder: Path) -> None:
    """By torch's own wrapper: accelerate's for FSDP1 does not work without an accelerator."""
    model = make(setting)
    layers = {type(model.get_base_model().model.layers[0])}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=layers)
    sharded = FSDP(model, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    optimizer = optimizer_of(sharded)
    rank = torch.distributed.get_rank()
    for batch in ROWS.split(BATCH):
        own = batch[rank :: torch.distributed.get_world_size()]
        sharded(input_ids=own, labels=own).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with FSDP.state_dict_type(sharded, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=True)):
        state = sharded.state_dict()
    model.save_pretrained(folder, is_main_process=rank == 0, state_dict=state)


def train_fsdp2(setting: str, folder: Path, is_lean: bool = False) -> None:
    """Where it is lean, as by `cpu_ram_efficient_loading`, one process alone has weights to begin with."""
    AcceleratorState._reset_state(reset_partial_state=True)
    # accelerate keeps FSDP for accelerators, torch does not.
    process = PartialState(cpu=True)
    process.distributed_type, process.device = DistributedType.FSDP, torch.device("cpu")
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
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
        train_fsdp1(setting, folder / setting / "fsdp1")
        train_fsdp2(setting, folder / setting / "fsdp2")
        train_fsdp2(setting, folder / setting / "fsdp2-lean", is_lean=True)
        if torch.distributed.get_rank() == 0:
            train_alone(setting, folder / setting / "alone")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
