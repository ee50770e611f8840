"""The states that recurrent layers start from: exact with padding, packing and adapters of any rows, and trained."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from helpers.prefixed import perturb, state_layers, with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig

# A gated delta rule, a Mamba-2, a convolution alone.
MIXERS = ("qwen3_next", "bamba", "lfm2")
TEXT = [1, 5, 17, 40, 23, 99, 64]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module", params=MIXERS)
def base(request):
    return tiny_model(request.param)


@pytest.fixture
def random_prefix(base):
    """The base model with a prefix of random K/V and states, which its answers depend on."""
    return with_prefix(copy.deepcopy(base))


def state_gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if "_state_" in name}


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(input_ids=ids, **{"use_cache": False, **inputs}).logits


@torch.no_grad()
def test_states_matter(random_prefix):
    ids = random_ids(1, 9)
    before = logits(random_prefix, ids)
    for layer in state_layers(random_prefix):
        for kind, number in layer.states:
            layer.state(kind, number)["default"].zero_()
    assert not torch.allclose(logits(random_prefix, ids), before, atol=0.05)


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_with_padding_on_either_side_are_as_alone(random_prefix, use_cache):
    rows, width = [random_ids(1, length, seed=length) for length in (9, 6, 4, 1)], 9
    expected = [logits(random_prefix, row)[0] for row in rows]
    for left in (True, False):
        pads = [torch.zeros(1, width - row.shape[1], dtype=torch.long) for row in rows]
        ids = torch.cat(
            [torch.cat([pad, row] if left else [row, pad], dim=1) for pad, row in zip(pads, rows, strict=True)]
        )
        mask = torch.cat(
            [
                torch.cat([pad, torch.ones_like(row)] if left else [torch.ones_like(row), pad], dim=1)
                for pad, row in zip(pads, rows, strict=True)
            ]
        )
        actual = logits(random_prefix, ids, attention_mask=mask, use_cache=use_cache)
        for row, alone, seen in zip(actual, expected, mask.bool(), strict=True):
            torch.testing.assert_close(row[seen], alone, **CLOSE)


@pytest.mark.parametrize("chunk", [2, 5])
def test_a_prefill_in_chunks_of_which_some_are_padding(random_prefix, chunk):
    """A row may begin in any chunk; no state decays before."""
    long, short = random_ids(1, 10, seed=1), random_ids(1, 3, seed=2)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 7, dtype=torch.long), short], dim=1)])
    mask = (torch.arange(10)[None] >= torch.tensor([[0], [7]])).long()
    options = {"max_new_tokens": 6, "do_sample": False}
    together = random_prefix.generate(input_ids=ids, attention_mask=mask, prefill_chunk_size=chunk, **options)
    for row, alone in zip(together, (long, short), strict=True):
        expected = random_prefix.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(row[10:], expected[0, alone.shape[1] :])


def test_packed_sequences_start_from_the_states(random_prefix):
    parts = [random_ids(1, length, seed=length) for length in (5, 3, 8)]
    expected = torch.cat([logits(random_prefix, part) for part in parts], dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    packed = torch.cat(parts, dim=1)
    torch.testing.assert_close(logits(random_prefix, packed, position_ids=positions), expected, **CLOSE)
    with pytest.raises(ValueError, match="`use_cache=False`"):
        logits(random_prefix, packed, position_ids=positions, use_cache=True)


def test_rows_of_different_adapters(base):
    model = with_prefix(copy.deepcopy(base), adapter_name="a")
    settings = {"task_type": "CAUSAL_LM", "init_std": 1.0, "reparam": "none"}
    model.add_adapter("long", PrefixExtConfig(num_virtual_tokens=11, **settings))
    model.add_adapter("attention", PrefixExtConfig(num_virtual_tokens=5, state_prefix=False, **settings))
    ids = random_ids(4, 9)
    expected = []
    for row, name in zip(ids, ("long", "a", "attention"), strict=False):
        model.set_adapter(name)
        expected.append(logits(model, row[None]))
    with model.disable_adapter():
        expected.append(logits(model, ids[3:]))
    names = ["long", "a", "attention", "__base__"]
    torch.testing.assert_close(logits(model, ids, adapter_names=names), torch.cat(expected), **CLOSE)
    torch.testing.assert_close(expected[3], logits(base, ids[3:]), **CLOSE)
    padded = torch.cat([torch.zeros(4, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(12) >= 3).long().expand(4, -1)
    actual = logits(model, padded, attention_mask=mask, adapter_names=names, use_cache=True)
    torch.testing.assert_close(actual[:, 3:], torch.cat(expected), **CLOSE)


def test_the_first_token_alone_and_static_caches(random_prefix):
    ids = random_ids(2, 1)
    greedy = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = random_prefix.generate(input_ids=ids, use_cache=False, **greedy)
    assert torch.equal(random_prefix.generate(input_ids=ids, **greedy), expected)
    assert torch.equal(random_prefix.generate(input_ids=ids, cache_implementation="static", **greedy), expected)
    cache = DynamicCache(config=random_prefix.config)
    first = logits(random_prefix, ids, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(first, logits(random_prefix, ids), **CLOSE)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_under_checkpointing(base, use_reentrant):
    model = with_prefix(copy.deepcopy(base), init_std=0.3, reparam="mlp").train()
    ids = random_ids(3, 9)
    mask = (torch.arange(9)[None] >= torch.tensor([[0], [2], [5]])).long()

    def backward():
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        return state_gradients(model)

    expected = backward()
    assert expected
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for name, gradient in backward().items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-3)


def test_two_passes_before_one_backward_pass_under_checkpointing(base):
    """The layers get positions, which tell the passes apart; their mixers get none."""
    model = with_prefix(copy.deepcopy(base), init_std=0.3, prefix_dropout=0.3).train()
    one, two = random_ids(1, 6, seed=1), random_ids(1, 6, seed=2)

    def backward():
        torch.manual_seed(0)
        model.zero_grad()
        losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in (one, two)]
        sum(losses).backward()
        return state_gradients(model)

    expected = backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in backward().items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-3)


def test_layers_that_do_not_train_keep_their_states(base):
    first, *others = (layer.index for layer in state_layers(with_prefix(copy.deepcopy(base))))
    model = with_prefix(copy.deepcopy(base), layers_to_train=[first])
    for layer in state_layers(model):
        trains = bool([*layer.parameters()])
        assert trains == (layer.index == first)
        assert len([*layer.buffers()]) == (0 if trains else len(layer.states))
    assert others


def test_states_beside_an_mlp_are_scaled_and_start_exactly(base):
    ids = random_ids(2, 9)
    settings = {"init": "tokens", "init_token_ids": TEXT}
    flat, scaled = (with_prefix(copy.deepcopy(base), reparam=reparam, **settings) for reparam in ("none", "mlp"))
    assert torch.equal(logits(flat, ids), logits(scaled, ids))
    for one, two in zip(state_layers(flat), state_layers(scaled), strict=True):
        for kind, number in one.states:
            assert torch.equal(one.state(kind, number)["default"], 8 * two.state(kind, number)["default"])


def test_with_lora_below_copied_and_pickled(base):
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = with_prefix(get_peft_model(copy.deepcopy(base), lora), adapter_name="task")
    perturb(model)
    ids = random_ids(2, 9)
    expected = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids), expected)
        perturb(twin)
        assert not torch.equal(logits(twin, ids), expected)
    assert torch.equal(logits(model, ids), expected)


def test_without_states_the_recurrent_layers_are_those_of_the_base_model(base):
    model = with_prefix(copy.deepcopy(base), state_prefix=False)
    assert not state_layers(model)
    assert not [name for name, _ in model.named_parameters() if "_state_" in name]
    bare = model.unload()
    assert torch.equal(logits(bare, random_ids(1, 5)), logits(base, random_ids(1, 5)))


def test_removing_the_prefix_restores_the_model(base, random_prefix):
    ids = random_ids(2, 9)
    with random_prefix.disable_adapter():
        assert torch.equal(logits(random_prefix, ids), logits(base, ids))
    assert torch.equal(logits(random_prefix.unload(), ids), logits(base, ids))
