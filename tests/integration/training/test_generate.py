"""Sampling, packed sequences, and calls to parts of the model with a prefix."""

from __future__ import annotations

import pytest
import torch

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids


@torch.no_grad()
def test_sampling_follows_the_seed(llama):
    model = with_prefix(llama)
    ids = random_ids(2, 8)

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=True)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@torch.no_grad()
def test_packed_sequences_do_not_leak_and_each_sees_the_prefix(llama):
    model = with_prefix(llama)
    first, second = random_ids(1, 9), random_ids(1, 6, seed=3)
    positions = torch.cat([torch.arange(9), torch.arange(6)])[None]
    packed = model(input_ids=torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(input_ids=first).logits, model(input_ids=second).logits], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


def test_a_layer_called_alone_is_refused(llama):
    model = with_prefix(llama)
    model(input_ids=random_ids(1, 4))
    layer = model.get_base_model().model.layers[0]
    with pytest.raises(RuntimeError, match="call the whole model"):
        layer(torch.zeros(1, 2, 64), position_embeddings=(torch.zeros(1, 2, 16), torch.zeros(1, 2, 16)))


@torch.no_grad()
def test_the_bare_decoder_has_the_prefix_too(llama):
    model = with_prefix(llama)
    ids = random_ids(1, 5)
    base = model.get_base_model()
    assert torch.equal(base.lm_head(base.model(input_ids=ids).last_hidden_state), model(input_ids=ids).logits)
