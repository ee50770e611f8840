"""Starts prefixes on processes that are seeded otherwise; `test_same_start.py` launches it.

    python same_start.py FOLDER

Leaves, for each of `SETTINGS` and each process, FOLDER/SETTING/before-RANK and, after one step of training, FOLDER/SETTING/after-RANK.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from prefixed import with_prefix
from tiny import random_ids, tiny_model

SETTINGS: dict[str, dict] = {
    "mlp": {"reparam": "mlp"},
    "mlp-frozen": {"reparam": "mlp", "num_frozen_tokens": 2},
    "flat-of-some-layers": {"layers_to_train": [1], "num_frozen_tokens": 3},
    "vocab": {"reparam": "mlp", "init": "vocab"},
}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name, setting in SETTINGS.items():
        model = with_prefix(tiny_model("llama"), seed=rank, **setting)
        ids = random_ids(1, 6)
        model(input_ids=ids)  # nothing that only answers waits for another process
        model.save_pretrained(folder / name / f"before-{rank}")
        model.train()(input_ids=ids, labels=ids).loss.backward()
        model.save_pretrained(folder / name / f"after-{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
