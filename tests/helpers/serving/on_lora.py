"""Prefixes trained on LoRA, as PEFT saves them, and PEFT's answers with both."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_prefix_ext import PrefixExtConfig


def train(folder: Path, model: Path, seed: int, *, lora_first: bool) -> PeftModel:
    """Saves a LoRA adapter and a prefix, as if trained together, and returns the model with both."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
    prefix = PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=33, init_std=1.5)
    if lora_first:
        both = get_peft_model(get_peft_model(base, lora), prefix, adapter_name="prefix")
    else:
        both = get_peft_model(get_peft_model(base, prefix).get_base_model(), lora, adapter_name="lora")
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    both.eval().save_pretrained(folder)
    return both


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], max_tokens: int = 10) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
