"""The logits equal those of stock PEFT prefix tuning, where it works, for the same K/V."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

from helpers.prefixed import with_prefix
from helpers.tiny import STOCK, random_ids, tiny_model
from peft_prefix_ext.injection.layer import PrefixExtLayer

EAGER = ("gptj", "gpt_oss")
CASES = [
    (name, attention) for name in STOCK for attention in ("eager", "sdpa") if attention == "eager" or name not in EAGER
]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_logits_equal_stock_prefix_tuning(name, attention):
    try:
        base = tiny_model(name, attention=attention)
    except ValueError as error:  # Gemma 2 has no sdpa any more from transformers 5.23 on
        if "does not support an attention implementation" not in str(error):
            raise
        pytest.skip(str(error).partition(".")[0])
    ours = with_prefix(copy.deepcopy(base))
    stock = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)).eval()
    layers = [module for module in ours.modules() if isinstance(module, PrefixExtLayer)]
    kv = torch.stack([torch.stack([*layer.materialize("default", None)]) for layer in layers])
    with torch.no_grad():
        stock.prompt_encoder["default"].embedding.weight.copy_(kv.permute(3, 0, 1, 2, 4).reshape(7, -1))
    short, long = random_ids(2, 9), random_ids(2, 60)
    padded = torch.ones_like(long)
    padded[0, -20:] = 0
    with torch.no_grad():
        for ids, mask in [(short, torch.ones_like(short)), (long, torch.ones_like(long)), (long, padded)]:
            kept = mask.bool()
            expected = stock(input_ids=ids, attention_mask=mask).logits[kept]
            assert torch.equal(ours(input_ids=ids, attention_mask=mask).logits[kept], expected)
        with ours.disable_adapter():
            assert not torch.allclose(ours(input_ids=long).logits[padded.bool()], expected, atol=1e-2)
