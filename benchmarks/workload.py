"""What the engines are asked: requests of fixed lengths, and the adapters they name."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from peft_prefix_ext import PrefixExtConfig
from peft_prefix_ext.checkpoint import CONFIG_NAME, WEIGHTS_NAME


@dataclass(frozen=True)
class Job:
    """One request.

    Args:
        prompt: Its token ids, those of a text prefix included.
        adapter: The name of its adapter; None for the base model.
    """

    prompt: list[int]
    adapter: str | None = None


@dataclass(frozen=True)
class Workload:
    """Requests that are all as long as one another.

    Args:
        num_requests: How many come at once.
        input_tokens: Real tokens of a prompt, without a prefix.
        output_tokens: Tokens of an answer; it never ends before.
        vocab_size: Prompts are drawn from that many ids, uniformly.
    """

    num_requests: int
    input_tokens: int
    output_tokens: int
    vocab_size: int

    def jobs(self, seed: str, adapters: Sequence[str | None] = (None,), prefix: Sequence[int] = ()) -> list[Job]:
        """Returns requests with new prompts, which no cache holds.

        Args:
            seed: What they are drawn with.
            adapters: As many of these as there are requests, each once before any comes again.
            prefix: Tokens in front of every prompt.
        """
        rng = random.Random(seed)
        names: list[str | None] = []
        while len(names) < self.num_requests:
            names += rng.sample(adapters, min(len(adapters), self.num_requests - len(names)))
        return [Job([*prefix, *self.tokens(rng, self.input_tokens)], name) for name in names]

    def tokens(self, rng: random.Random, number: int) -> list[int]:
        return [rng.randrange(self.vocab_size) for _ in range(number)]


def write_prefixes(folder: Path, base: PreTrainedModel, num_virtual_tokens: int, number: int) -> dict[str, Path]:
    """Saves so many prefixes of random numbers, all different, and returns their folders by name."""
    config = PrefixExtConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, reparam="none", init="random"
    )
    return _write(folder, base, config, [f"prefix{num_virtual_tokens}-{index}" for index in range(number)])


def write_loras(folder: Path, base: PreTrainedModel, rank: int, number: int) -> dict[str, Path]:
    """Saves so many LoRA adapters of PEFT's default target modules, and returns their folders by name."""
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank)
    return _write(folder, base, config, [f"lora{rank}-{index}" for index in range(number)])


def _write(folder: Path, base: PreTrainedModel, config: PeftConfig, names: Sequence[str]) -> dict[str, Path]:
    """Saves an adapter, then others like it whose numbers are drawn anew: their values do not matter for speed."""
    model = get_peft_model(base, config)
    paths = {name: folder / name for name in names}
    first = paths[names[0]]
    model.save_pretrained(str(first))
    model.unload()
    with safe_open(first / WEIGHTS_NAME, framework="pt") as tensors:
        metadata = tensors.metadata()
    like = load_file(first / WEIGHTS_NAME)
    for index, path in enumerate(paths.values()):
        path.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(index)
        drawn = {
            key: (0.1 * torch.randn(value.shape, generator=generator)).to(base.dtype) for key, value in like.items()
        }
        save_file(drawn, path / WEIGHTS_NAME, metadata=metadata)
        if path != first:
            shutil.copy(first / CONFIG_NAME, path)
    return paths
