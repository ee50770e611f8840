"""What stock PEFT's prefix tuning gets wrong or refuses and no other test here covers.

Elsewhere: gradient checkpointing (test_gradient_checkpointing.py), caches, chunks, padding, latent attention, multi-query, hybrids and MPT
(test_architectures.py), packing, prompt lookup and conversations (test_modes.py), rows with adapters of their own
(test_adapter_names.py), resuming with an MLP (test_trainer.py).
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

from helpers.prefixed import with_prefix, with_prefix_of
from helpers.tiny import random_ids, tiny_model

TEXT = [1, 5, 17, 40, 23, 99]


def after(base, text, ids):
    with torch.no_grad():
        return base(input_ids=torch.cat([torch.tensor([text]), ids], dim=1)).logits[:, len(text) :]


def test_without_a_task_type(llama):
    ids = random_ids(1, 9)
    expected = with_prefix(copy.deepcopy(llama))(input_ids=ids).logits
    assert torch.equal(with_prefix(copy.deepcopy(llama), task_type=None)(input_ids=ids).logits, expected)
    with pytest.raises(KeyError):
        get_peft_model(llama, PrefixTuningConfig(num_virtual_tokens=4))


@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama4", "gpt_oss"])
def test_a_text_longer_than_the_window(name, word_tokenizer):
    base = tiny_model(name, attention="eager")
    words = list(range(2, 32))
    model = with_prefix(
        copy.deepcopy(base),
        init="text",
        init_text=" ".join(f"w{word}" for word in words),
        tokenizer_name_or_path=word_tokenizer,
        num_virtual_tokens=31,
    )
    ids = random_ids(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, after(base, [1, *words], ids), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(("name", "options"), [("gemma4", {}), ("mistral", {}), ("llama4", {"floor_scale": 8192})])
def test_packed_texts_in_windows_and_chunks(name, options):
    base = tiny_model(name, attention="eager", **options)
    model = with_prefix_of(copy.deepcopy(base), TEXT)
    texts = [random_ids(1, length, seed=length) for length in (9, 33, 1, 14)]
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat(texts, dim=1), position_ids=positions, use_cache=False).logits
    expected = torch.cat([after(base, TEXT, text) for text in texts], dim=1)
    torch.testing.assert_close(packed, expected, atol=5e-5, rtol=1e-3)
