"""The sweep: on every architecture a prefix acts like its text, trains, generates, saves and loads."""

from __future__ import annotations

import copy
from functools import cached_property

import pytest
import torch
import transformers
from packaging import version
from peft import PeftModel
from transformers import DynamicCache

from helpers.architectures import MULTIMODAL
from helpers.architectures_page import PAGE, rewritten
from helpers.multimodal_configs import MULTIMODAL as MULTIMODAL_CONFIGS
from helpers.prefixed import perturb, with_prefix, with_prefix_of
from helpers.serving import served
from helpers.tiny import CONFIGS, STATELESS, random_ids, tiny_model

TEXT = [1, 5, 17, 40, 23, 99, 64]
LENGTH = 40  # more than the windows and chunks of the tiny models
EXACT = {"atol": 2e-4, "rtol": 1e-3}  # of logits around 5; Gemma 4's own caches differ by 1e-4

MODES = {
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 16},
}


class Case:
    """A base model, and the same with a prefix that is the text."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.base = tiny_model(name, attention="eager")
        self.model = with_prefix_of(copy.deepcopy(self.base), TEXT)
        self.ids = random_ids(2, LENGTH)
        self.base_lacks = CONFIGS[name].get("base_lacks", set())

    @cached_property
    def after_text(self) -> torch.Tensor:
        """What the base model says of `ids` after the text."""
        return reference(self.base, self.ids, self.name in STATELESS)

    @cached_property
    def answer(self) -> torch.Tensor:
        return generate(self.model, self.ids)


@torch.no_grad()
def reference(base, ids, is_stateless):
    """The logits of `ids` after the text by the base model alone.

    Where recurrent layers have no prefix, they must not have read the text: there a cache is made by hand in which it stands
    only for the attention layers.
    """
    text = torch.tensor([TEXT]).expand(len(ids), -1)
    if not is_stateless:
        return base(input_ids=torch.cat([text, ids], dim=1), use_cache=False).logits[:, len(TEXT) :]
    read, cache = DynamicCache(config=base.config), DynamicCache(config=base.config)
    base(input_ids=text, past_key_values=read)
    for index, layer in enumerate(read.layers):
        if getattr(layer, "keys", None) is not None:
            cache.update(layer.keys, layer.values, index)
    positions = torch.arange(ids.shape[1])[None] + len(TEXT)
    mask = torch.ones(len(ids), len(TEXT) + ids.shape[1], dtype=torch.long)
    return base(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache).logits


@torch.no_grad()
def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
    return out[:, ids.shape[1] :]


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request):
    return Case(request.param)


@torch.no_grad()
def test_a_prefix_of_text_is_the_text(case):
    assert case.after_text.std() > 0.01
    for use_cache in (False, True):
        actual = case.model(input_ids=case.ids, use_cache=use_cache).logits
        torch.testing.assert_close(actual, case.after_text, **EXACT)
    assert not torch.allclose(case.base(input_ids=case.ids).logits, case.after_text, atol=1e-2)


@torch.no_grad()
def test_a_prefix_of_text_is_the_text_in_fused_attention(case):
    if not case.base._supports_sdpa:
        return
    base = copy.deepcopy(case.base)
    base.set_attn_implementation("sdpa")
    expected = reference(base, case.ids, case.name in STATELESS)
    torch.testing.assert_close(with_prefix_of(base, TEXT)(input_ids=case.ids).logits, expected, **EXACT)


@torch.no_grad()
def test_padding_changes_nothing(case):
    padding = torch.zeros(2, 12, dtype=torch.long)
    sides = {
        "left padding": ([padding, case.ids], slice(12, None)),
        "right padding": ([case.ids, padding], slice(LENGTH)),
    }
    for side in sides.keys() - case.base_lacks:
        order, kept = sides[side]
        mask = torch.cat([torch.ones_like(part) if part is case.ids else padding for part in order], dim=1)
        logits = case.model(input_ids=torch.cat(order, dim=1), attention_mask=mask).logits[:, kept]
        torch.testing.assert_close(logits, case.after_text, **EXACT)


def test_generates_what_it_says(case):
    whole = torch.cat([case.ids, case.answer], dim=1)
    with torch.no_grad():
        logits = case.model(input_ids=whole, use_cache=False).logits
    assert torch.equal(logits[:, LENGTH - 1 : -1].argmax(-1), case.answer)


@pytest.mark.parametrize("mode", list(MODES))
def test_no_mode_changes_the_answer(case, mode):
    if mode in case.base_lacks:
        # Of the releases that are tested the newest have more modes than the oldest.
        has = _has(case, mode)
        assert not has or version.parse(transformers.__version__) >= version.parse("5.24")
        if not has:
            return
    assert torch.equal(generate(case.model, case.ids, **MODES[mode]), case.answer)


def _has(case, mode):
    """Whether the mode does not change what the base model answers."""
    try:
        return torch.equal(generate(case.base, case.ids, **MODES[mode]), generate(case.base, case.ids))
    except (RuntimeError, TypeError, ValueError):
        return False


def test_padded_rows_answer_as_alone(case):
    padding = torch.zeros(1, 12, dtype=torch.long)
    ids = torch.cat([case.ids[:1], torch.cat([padding, case.ids[1:, 12:]], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :12] = 0
    together = generate(case.model, ids, mask)
    assert torch.equal(together[:1], case.answer[:1])
    assert torch.equal(together[1:], generate(case.model, case.ids[1:, 12:]))


def test_beams_are_those_after_the_text(case):
    beams = {"num_beams": 3, "num_return_sequences": 2}
    actual = generate(case.model, case.ids, **beams)
    if case.name in STATELESS:
        expected = generate(case.model, case.ids, use_cache=False, **beams)
    else:
        expected = generate(case.base, torch.cat([torch.tensor([TEXT]).expand(2, -1), case.ids], dim=1), **beams)
    assert torch.equal(actual, expected)


def test_a_conversation_continues_with_its_cache(case):
    def goes_on(model):
        cache = DynamicCache(config=case.base.config)
        answer = generate(model, case.ids[:, :30], past_key_values=cache)
        turns = torch.cat([case.ids[:, :30], answer, case.ids[:, 30:]], dim=1)
        with torch.no_grad():
            new = model(input_ids=turns[:, cache.get_seq_length() :], past_key_values=cache).logits
            whole = model(input_ids=turns).logits[:, -new.shape[1] :]
            return torch.allclose(new, whole, atol=2e-3, rtol=1e-3)  # Zamba2 alone differs by 1e-3

    if "conversation" in case.base_lacks:
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            assert goes_on(case.base)
    else:
        assert goes_on(case.model)


def test_trains_with_and_without_checkpointing(case):
    model = with_prefix(copy.deepcopy(case.base), init_std=0.3, reparam="mlp").train()
    perturb(model, std=0.05)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def backward():
        model.zero_grad()
        torch.manual_seed(0)  # the same dropout in every pass
        loss = model(input_ids=case.ids, labels=case.ids).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in parameters.items()}

    before, expected = backward()
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _, actual = backward()
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.02)
    for _ in range(4):
        optimizer.step()
        after, _ = backward()
    assert after < before - 0.01


def test_saves_and_loads(case, tmp_path):
    model = with_prefix(copy.deepcopy(case.base), reparam="mlp", num_frozen_tokens=1)
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(case.base), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=case.ids).logits, model(input_ids=case.ids).logits)


def test_the_table_in_the_documentation_is_that_of_the_tests():
    """Rewrite it with `python tests/helpers/architectures.py`."""
    page = PAGE.read_text(encoding="utf-8")
    assert rewritten(page) == page
    assert len({name.partition(":")[0] for name in CONFIGS}) >= 100
    assert {name.partition(":")[0] for name in MULTIMODAL_CONFIGS} == MULTIMODAL.keys()
    assert {*served.EXACT, *served.SOAK, *served.HYBRIDS, *served.REFUSED} <= CONFIGS.keys()
    assert {*served.MULTIMODAL_TEXT, *served.MULTIMODAL_IMAGES} <= MULTIMODAL.keys()
