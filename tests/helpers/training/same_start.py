"""Creates prefixes in processes with different seeds and trains them sharded; launched by `test_same_start.py`.

    python same_start.py FOLDER

Leaves, for each of `SETTINGS` and each process, FOLDER/SETTING/before-RANK.safetensors with what does not train, and
after-RANK.safetensors with the same after a step of training.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext.injection.prefix_tensors import PrefixTensors

SETTINGS: dict[str, dict] = {
    "mlp": {"reparam": "mlp"},
    "mlp-frozen": {"reparam": "mlp", "num_frozen_tokens": 2},
    "flat-of-some-layers": {"layers_to_train": [1], "num_frozen_tokens": 3},
    "vocab": {"reparam": "mlp", "init": "vocab"},
}


def shard(model: PeftModel, strategy: str) -> torch.nn.Module:
    """Shards layer by layer, as trainers do."""
    layers = model.get_base_model().model.layers
    if strategy == "fsdp1":
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(layers[0])})
        options = {"use_orig_params": True, "auto_wrap_policy": policy, "device_id": torch.device("cpu")}
        return FullyShardedDataParallel(model, **options)
    mesh = init_device_mesh("cpu", (2,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def save(model: torch.nn.Module, path: Path) -> None:
    kept = {
        f"{name.replace('_fsdp_wrapped_module.', '')}.{key}": state.contiguous()
        for name, states in model.named_modules()
        if isinstance(states, PrefixTensors)
        for key, state in states._buffers.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(kept, path)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for strategy in ("fsdp1", "fsdp2"):
        for name, setting in SETTINGS.items():
            model = with_prefix(tiny_model("llama"), seed=rank, **setting)
            if rank == 0:  # nothing that a process does alone waits for another
                model(input_ids=random_ids(1, 6))
            save(model, folder / strategy / name / f"before-{rank}.safetensors")
            trained = shard(model, strategy)
            ids = random_ids(1, 6)
            trained.train()(input_ids=ids, labels=ids).loss.backward()
            save(trained, folder / strategy / name / f"after-{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
