"""Which forward pass a layer belongs to: the running one, one that checkpointing repeats, or none."""

from __future__ import annotations

import pytest
import torch

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model


def checkpointed(name):
    model = with_prefix(tiny_model(name, attention="eager")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def loss(model, length):
    ids = random_ids(2, length)
    return model(input_ids=ids, labels=ids).loss


def test_layers_without_positions_repeat_the_last_forward_pass():
    model = checkpointed("bloom")
    for length in (9, 5):
        loss(model, length).backward()
    both = loss(model, 9) + loss(model, 5)
    with pytest.raises(RuntimeError, match="needs a backward pass after each forward pass with a prefix"):
        both.backward()


@torch.no_grad()
def test_a_forward_pass_keeps_its_prefix(llama):
    """As when another thread switches adapters off while this one is between two layers."""
    model, ids = with_prefix(llama), random_ids(2, 9)
    expected = model(input_ids=ids).logits
    decoder = model.get_base_model().model

    def disable(*args):
        decoder.prefix_ext._disable_adapters = True

    decoder.layers[0].register_forward_hook(disable)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-2)


def test_a_layer_called_alone_is_refused(llama):
    model = with_prefix(llama)
    model(input_ids=random_ids(1, 4))
    layer = model.get_base_model().model.layers[0]
    states = torch.zeros(1, 4, 64)
    with pytest.raises(RuntimeError, match="call the whole model"):
        layer(states)
