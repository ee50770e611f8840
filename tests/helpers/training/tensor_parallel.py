"""Trains prefixes of tensor-parallel models in two processes; launched by `test_tensor_parallel.py`.

    python tensor_parallel.py FOLDER

Leaves, for each model and each of `SETTINGS`, FOLDER/MODEL/SETTING with `losses.json` by who trained: "together" from
`start-0`, which is what the processes started from, "resumed" and "alone" from the same after loading it, on the two
processes and on one; and the adapter afterwards, `together-0` and `together-1` as saved by each process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model

ROWS, BATCH = random_ids(32, 12, seed=4), 8
SETTINGS: dict[str, dict] = {
    "flat": {"num_frozen_tokens": 2},
    "mlp": {"reparam": "mlp", "num_frozen_tokens": 2},
    "vocab": {"reparam": "mlp", "reparam_residual": False, "init": "vocab", "layers_to_train": [0, 2]},
}
MODELS = {"llama": list(SETTINGS), "qwen3": ["mlp"], "deepseek_v3": ["flat"]}


def load(folder: Path, is_spread: bool) -> torch.nn.Module:
    plan = {"tp_plan": "auto"} if is_spread else {}
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, **plan)


def train(model: PeftModel) -> list[float]:
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, eps=1e-3)
    for batch in ROWS.split(BATCH):
        loss = model.train()(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(folder: Path, name: str, setting: str) -> None:
    rank = dist.get_rank()
    target = folder / setting
    # Processes that were seeded otherwise start alike all the same.
    together = with_prefix(load(folder, is_spread=True), seed=rank, **SETTINGS[setting])
    together.save_pretrained(target / f"start-{rank}")
    dist.barrier()
    losses = {"together": train(together)}
    together.save_pretrained(target / f"together-{rank}")
    resumed = PeftModel.from_pretrained(load(folder, is_spread=True), target / "start-0", is_trainable=True)
    losses["resumed"] = train(resumed)
    if rank == 0:
        alone = PeftModel.from_pretrained(load(folder, is_spread=False), target / "start-0", is_trainable=True)
        losses["alone"] = train(alone)
        alone.save_pretrained(target / "alone")
        (target / "losses.json").write_text(json.dumps(losses))
    dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name, settings in MODELS.items():
        folder = Path(sys.argv[1]) / name
        if dist.get_rank() == 0:
            tiny_model(name).save_pretrained(folder / "base")
        dist.barrier()
        for setting in settings:
            main(folder, name, setting)
