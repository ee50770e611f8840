"""On every architecture, generating gives what a forward pass over the whole sequence says."""

from __future__ import annotations

import pytest
import torch
from prefixed import with_prefix
from tiny import CONFIGS, random_ids, tiny_model

PROMPT = 40  # longer than the sliding windows of the tiny models


def greedy(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **kwargs)
    return out[:, ids.shape[1] :]


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    return with_prefix(tiny_model(request.param, attention="eager"))


@torch.no_grad()
def test_greedy_decoding_equals_full_forward(model):
    ids = random_ids(2, PROMPT)
    new = greedy(model, ids)
    whole = torch.cat([ids, new], dim=1)
    logits = model(input_ids=whole, use_cache=False).logits
    assert torch.equal(logits[:, PROMPT - 1 : -1].argmax(-1), new)


@torch.no_grad()
def test_left_padding_changes_nothing(model):
    long, short = random_ids(1, PROMPT), random_ids(1, 28, seed=5)
    padding = torch.zeros(1, PROMPT - 28, dtype=torch.long)
    ids = torch.cat([long, torch.cat([padding, short], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, : PROMPT - 28] = 0
    together = greedy(model, ids, mask)
    assert torch.equal(together[:1], greedy(model, long))
    assert torch.equal(together[1:], greedy(model, short))


@torch.no_grad()
def test_padding_on_either_side_changes_no_logit(model):
    """Also without `position_ids`, as in training: padding must not come between the prefix and the text."""
    ids = random_ids(1, 30)
    padding = torch.zeros(1, 20, dtype=torch.long)
    alone = model(input_ids=ids).logits
    for order, kept in (([padding, ids], slice(20, None)), ([ids, padding], slice(30))):
        mask = torch.cat([torch.ones_like(part) if part is ids else padding for part in order], dim=1)
        padded = model(input_ids=torch.cat(order, dim=1), attention_mask=mask).logits[:, kept]
        torch.testing.assert_close(padded, alone, atol=5e-5, rtol=1e-3)


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


def test_a_layer_called_alone_says_so(llama):
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
