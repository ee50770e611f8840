"""Processes that train one prefix start from the same one.

What trains is a parameter, which DDP, FSDP and DeepSpeed make the same in all processes; what an MLP adds to is a buffer, which
DDP alone does. Drawn at random in processes of different seeds, each would add to something else, and say so to nobody.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import nn

from peft_prefix_ext.states import PrefixStates

# What the first process hands to the others goes through its memory.
MAX_BYTES = 256 << 20
_started: Counter[str] = Counter()


@torch.no_grad()
def start_as_first_process(decoder: nn.Module, adapter_name: str) -> None:
    """Gives an adapter, before its first step of training, the first process' tensors that do not train.

    Through the store of the process group, and not by a collective: only the others wait, and only for the first.

    Raises:
        RuntimeError: If they differ and are too large for that.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    states = {name: state for name, state in _kept(decoder, adapter_name).items() if not state.is_meta}
    if not states:
        return
    own = save({name: state.cpu().contiguous() for name, state in states.items()})
    digest = hashlib.sha256(own).hexdigest()
    # Every process starts its trainings in the same order.
    run = f"peft_prefix_ext/{adapter_name}/{'/'.join(sorted(states))}"
    _started[run] += 1
    key = f"{hashlib.sha256(run.encode()).hexdigest()}/{_started[run]}"
    store: Any = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        if len(own) <= MAX_BYTES:
            store.set(f"{key}/states", own)
        store.set(f"{key}/digest", digest)
        return
    if store.get(f"{key}/digest").decode() == digest:
        return
    if len(own) > MAX_BYTES:
        raise RuntimeError(
            f"Adapter {adapter_name!r} starts from other K/V in each process: call `torch.manual_seed` with the same number in "
            "all of them before `get_peft_model`."
        )
    for name, state in load(store.get(f"{key}/states")).items():
        states[name].copy_(state)


def _kept(decoder: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of an adapter that do not train, by names that are the same in all processes."""
    return {
        f"{name}.{adapter_name}": states[adapter_name]
        for name, states in decoder.named_modules()
        if isinstance(states, PrefixStates) and adapter_name in states._buffers
    }
