"""Trains adapters with DeepSpeed ZeRO, on a CPU and in one process each; launched by `test_deepspeed.py`.

    python deepspeed_zero.py FOLDER CASE...

A case is `ADAPTER-STAGE-WHEN`, such as `mlp-3-late`: the model is made before DeepSpeed is known of, or after, when ZeRO-3 has it
born partitioned. With `-low` the learning rate is too low for a prefix. Leaves in FOLDER/CASE what was evaluated, `losses.json`: at the end of training, the same after resuming in
the middle, and with the saved adapter on a model of plain transformers.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
os.environ["MASTER_ADDR"] = "127.0.0.1"

import deepspeed
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig

# An operation between processes of one machine, which would be compiled for a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

ROWS = [{"input_ids": row, "labels": row} for row in random_ids(32, 12, seed=4)]
PREFIX = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 7, "init_std": 0.5}
ADAPTERS = {
    "lora": LoraConfig(task_type="CAUSAL_LM"),
    "mlp": PrefixExtConfig(**PREFIX),
    "flat": PrefixExtConfig(**PREFIX, reparam="none", num_frozen_tokens=2),
    "part": PrefixExtConfig(**PREFIX, layers_to_train=[0, 2]),
    "states": PrefixExtConfig(**PREFIX, reparam="none"),
}
# A hybrid, whose recurrent layers train their states.
BASES = {"states": "bamba"}


def base(folder: Path, case: str) -> torch.nn.Module:
    name = BASES.get(case.split("-")[0], "llama")
    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)


def trainer_of(folder: Path, case: str, seed: int, steps: int) -> Trainer:
    adapter, stage, when, *low = case.split("-")

    def make() -> PeftModel:
        torch.manual_seed(seed)
        return get_peft_model(base(folder, case), ADAPTERS[adapter])

    model = make() if when == "early" else None
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"), "auto")
    arguments = TrainingArguments(
        str(folder / case),
        max_steps=steps,
        save_steps=2,
        report_to="none",
        learning_rate=1e-4 if low else 2e-2,
        lr_scheduler_type="constant",
        disable_tqdm=True,
        deepspeed={
            **auto,
            "zero_optimization": {"stage": int(stage), "stage3_param_persistence_threshold": 0},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        },
    )
    return Trainer(model or make(), arguments, train_dataset=ROWS, eval_dataset=ROWS)


def train(folder: Path, case: str) -> None:
    trainer = trainer_of(folder, case, seed=1, steps=4)
    trainer.train()
    write(folder, case, "end", trainer.evaluate()["eval_loss"])
    trainer.save_model(folder / case / "adapter")
    if "-3-" in case:
        with pytest.raises(ValueError, match="are spread over processes"):
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder / case / "not gathered")


def resume(folder: Path, case: str) -> None:
    trainer = trainer_of(folder, case, seed=2, steps=4)
    trainer.train(resume_from_checkpoint=str(folder / case / "checkpoint-2"))
    write(folder, case, "resumed", trainer.evaluate()["eval_loss"])


@torch.no_grad()
def load(folder: Path, case: str) -> None:
    model = PeftModel.from_pretrained(base(folder, case), folder / case / "adapter").eval()
    rows = torch.stack([row["input_ids"] for row in ROWS])
    write(folder, case, "loaded", model(input_ids=rows, labels=rows).loss.item())


def write(folder: Path, case: str, what: str, loss: float) -> None:
    path = folder / case / "losses.json"
    losses = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**losses, what: loss}))


def main(folder: Path, cases: list[str]) -> None:
    port = 29700 + os.getpid() % 1000
    for case in cases:
        for part in (train, resume, load):
            # DeepSpeed is set up once in a process; but what takes long is to import it.
            os.environ["MASTER_PORT"] = str(port := port + 1)
            if process := os.fork():
                assert os.waitpid(process, 0)[1] == 0, (case, part.__name__)
                continue
            try:
                part(folder, case)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in ("llama", *BASES.values()):
        tiny_model(name).save_pretrained(folder / name)
    main(folder, sys.argv[2:])
