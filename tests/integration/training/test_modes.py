"""Every mode of `generate` and `forward`: a prefix of a text must act like the text on the base model."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model

TEXT = [1, 5, 17, 40, 23, 99]
PROMPT = 40  # longer than the sliding windows of the tiny models


def after_text(ids):
    return torch.cat([torch.tensor([TEXT]).expand(len(ids), -1), ids], dim=1)


def text_prefix(name, tokenizer, **options):
    """The base model, and the same model with `TEXT` as its prefix."""
    return SimpleNamespace(
        base=tiny_model(name, **options),
        model=with_prefix(
            tiny_model(name, **options),
            init="text",
            init_text=" ".join(f"w{token}" for token in TEXT[1:]),
            tokenizer_name_or_path=tokenizer,
            num_virtual_tokens=len(TEXT),
        ),
    )


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def pair(request, word_tokenizer):
    return text_prefix(request.param, word_tokenizer)


def generate(model, ids, **options):
    torch.manual_seed(0)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options = {"attention_mask": torch.ones_like(ids), **settings, **options}
    out = model.generate(input_ids=ids, **options)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def assert_same(actual, expected):
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], atol=2e-5, rtol=1e-4)


SAMPLING = {"do_sample": True, "top_k": 50, "temperature": 0.9}
OF_A_BATCH = [
    {},
    SAMPLING,
    {**SAMPLING, "num_return_sequences": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {**SAMPLING, "num_beams": 3},
    {"use_cache": False},
    {"prefill_chunk_size": 7},
    {"cache_implementation": "static"},
    {"cache_implementation": "static", "num_beams": 3},
    {"cache_implementation": "static", "prefill_chunk_size": 7},
]


@pytest.mark.parametrize("options", OF_A_BATCH, ids=str)
def test_a_batch_generates_like_after_the_text(pair, options):
    ids = random_ids(2, PROMPT)
    assert_same(generate(pair.model, ids, **options), generate(pair.base, after_text(ids), **options))


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}], ids=str)
def test_prompt_lookup_changes_nothing(pair, options):
    ids = random_ids(1, 12).repeat(1, 3)  # something to look up
    assert_same(generate(pair.model, ids, **options), generate(pair.base, after_text(ids)))


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_assistants_with_and_without_a_prefix(pair, word_tokenizer, sampling):
    name = pair.base.config.model_type.removesuffix("_text")
    assistants = text_prefix(name, word_tokenizer, seed=0)  # of the same weights, so that candidates are taken
    ids = random_ids(1, PROMPT)
    expected = generate(pair.base, after_text(ids), assistant_model=assistants.base, **sampling)
    assert_same(generate(pair.model, ids, assistant_model=assistants.model, **sampling), expected)
    if not sampling:  # whatever the candidates are, the answer is the model's own
        assert_same(generate(pair.model, ids, assistant_model=assistants.base), expected)
        without = generate(pair.base, ids)
        assert_same(generate(pair.base, ids, assistant_model=assistants.model), without)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_a_conversation_continues_with_the_returned_cache(pair, cache_class):
    first, second = random_ids(2, 30), random_ids(2, 9, seed=4)

    def converse(model, opening):
        size = {"max_cache_len": 80} if cache_class is StaticCache else {}
        cache = cache_class(config=model.config, **size)
        answer, _ = generate(model, opening, past_key_values=cache)
        return generate(model, torch.cat([opening, answer, second], dim=1), past_key_values=cache)

    assert_same(converse(pair.model, first), converse(pair.base, after_text(first)))


def test_embeddings_instead_of_tokens(pair):
    ids = random_ids(2, PROMPT)
    embeddings = pair.base.get_input_embeddings()(ids)
    out = pair.model.generate(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False)
    assert torch.equal(out, generate(pair.model, ids)[0])
    with torch.no_grad():
        torch.testing.assert_close(pair.model(inputs_embeds=embeddings).logits, pair.model(input_ids=ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_beside_the_text(word_tokenizer, side, attention):
    pair = text_prefix("gemma3", word_tokenizer, attention=attention)
    whole, part = random_ids(1, 30), random_ids(1, 18, seed=2)
    padding = torch.zeros(1, 12, dtype=torch.long)
    row = torch.cat([padding, part] if side == "left" else [part, padding], dim=1)
    ids = torch.cat([whole, row])
    mask = torch.ones_like(ids)
    mask[1, :12] = 0
    if side == "right":
        mask[1] = mask[1].flip(0)
    logits = pair.model(input_ids=ids, attention_mask=mask).logits
    for index, text in enumerate([whole, part]):
        expected = pair.base(input_ids=after_text(text)).logits[0, len(TEXT) :]
        torch.testing.assert_close(logits[index][mask[index].bool()], expected, atol=5e-5, rtol=1e-3)


@torch.no_grad()
def test_packed_texts_each_follow_the_prefix(pair):
    """Windows and all; and without a mask, as packing collators leave it out."""
    texts = [random_ids(1, length, seed=length) for length in (9, 33, 1, 14)]
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    packed = pair.model(input_ids=torch.cat(texts, dim=1), position_ids=positions, use_cache=False).logits
    expected = torch.cat([pair.base(input_ids=after_text(text)).logits[:, len(TEXT) :] for text in texts], dim=1)
    torch.testing.assert_close(packed, expected, atol=5e-5, rtol=1e-3)


@torch.no_grad()
def test_what_a_forward_pass_returns(word_tokenizer):
    pair = text_prefix("gemma3", word_tokenizer, attention="eager")
    ids = random_ids(2, 30)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    actual, expected = pair.model(input_ids=ids, **wanted), pair.base(input_ids=after_text(ids), **wanted)
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs[:, len(TEXT) :], atol=5e-5, rtol=1e-3)
    for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):  # the prefix' columns come first
        torch.testing.assert_close(ours, theirs[:, :, len(TEXT) :], atol=5e-5, rtol=1e-3)
    as_tuple = pair.model(input_ids=ids, return_dict=False)
    assert torch.equal(as_tuple[0], actual.logits)
    last = pair.model(input_ids=ids, logits_to_keep=1).logits
    torch.testing.assert_close(last, actual.logits[:, -1:])


@pytest.mark.parametrize("setting", ["bfloat16", "float16", "autocast"])
@torch.no_grad()
def test_half_precision_is_as_exact_as_the_text(pair, word_tokenizer, setting):
    """Rounding differs with the order of sums; it must not differ in size."""
    ids = random_ids(2, PROMPT)
    exact = pair.base(input_ids=after_text(ids)).logits[:, len(TEXT) :]
    if setting == "autocast":
        half, context = pair, torch.autocast("cpu", torch.bfloat16)
    else:
        name, dtype = pair.base.config.model_type.removesuffix("_text"), getattr(torch, setting)
        half = text_prefix(name, word_tokenizer)
        half.base.to(dtype)
        half.model.to(dtype)
        context = nullcontext()
    with context:
        text = half.base(input_ids=after_text(ids)).logits[:, len(TEXT) :].float()
        prefix = half.model(input_ids=ids).logits.float()
    assert (prefix - exact).square().mean() < 2 * (text - exact).square().mean()
