"""Adapters with random weights: their values do not affect speed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from peft_prefix_ext import PrefixExtConfig
from peft_prefix_ext.checkpoint.format import CONFIG_NAME, WEIGHTS_NAME


def write_prefixes(folder: Path, base: PreTrainedModel, num_virtual_tokens: int, number: int) -> dict[str, Path]:
    """Saves `number` different prefixes and returns their folders by name."""
    config = PrefixExtConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, reparam="none", init="random"
    )
    return _write(folder, base, config, [f"prefix{num_virtual_tokens}-{index}" for index in range(number)])


def write_loras(folder: Path, base: PreTrainedModel, rank: int, number: int) -> dict[str, Path]:
    """Saves `number` different LoRA adapters with PEFT's default target modules and returns their folders by name."""
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank)
    return _write(folder, base, config, [f"lora{rank}-{index}" for index in range(number)])


def _write(folder: Path, base: PreTrainedModel, config: PeftConfig, names: Sequence[str]) -> dict[str, Path]:
    """Saves one adapter with PEFT, then copies of it with new random weights."""
    model = get_peft_model(base, config)
    paths = {name: folder / name for name in names}
    first = paths[names[0]]
    model.save_pretrained(str(first))
    model.unload()
    with safe_open(first / WEIGHTS_NAME, framework="pt") as tensors:
        metadata = tensors.metadata()
    template = load_file(first / WEIGHTS_NAME)
    for index, path in enumerate(paths.values()):
        path.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(index)
        weights = {
            key: (0.1 * torch.randn(value.shape, generator=generator)).to(base.dtype) for key, value in template.items()
        }
        save_file(weights, path / WEIGHTS_NAME, metadata=metadata)
        if path != first:
            shutil.copy(first / CONFIG_NAME, path)
    return paths
