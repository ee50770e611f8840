"""`init="text"` is the text: the model answers as if the words stood in its context."""

from __future__ import annotations

import pytest
import torch
from prefixed import with_prefix
from tiny import random_ids, tiny_model

WORDS = "w5 w17 w40 w23 w99 w64 w3 w77"
WORD_IDS = [1, 5, 17, 40, 23, 99, 64, 3, 77]  # behind the tokenizer's <s>


@pytest.mark.parametrize("reparam", ["none", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4", "gpt2"])
def test_prefix_of_text_equals_text_in_context(name, reparam, word_tokenizer):
    model = tiny_model(name, attention="eager")
    ids = random_ids(2, 40)
    text = torch.tensor([WORD_IDS]).expand(2, -1)
    with torch.no_grad():
        expected = model(input_ids=torch.cat([text, ids], dim=1)).logits[:, len(WORD_IDS) :]
        model = with_prefix(
            model,
            init="text",
            init_text=WORDS,
            tokenizer_name_or_path=word_tokenizer,
            num_virtual_tokens=len(WORD_IDS),
            num_frozen_tokens=1,
            reparam=reparam,
        )
        actual = model(input_ids=ids).logits
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(3, [1, 5, 17]), (9, WORD_IDS), (12, [*WORD_IDS, 5, 17, 40]), (1, [1])],
)
def test_text_is_cut_or_repeated_to_the_length(length, expected, word_tokenizer, llama):
    from peft_prefix_ext import PrefixExtConfig
    from peft_prefix_ext.initialization.tokens import text_tokens

    config = PrefixExtConfig(
        num_virtual_tokens=length, init="text", init_text=WORDS, tokenizer_name_or_path=word_tokenizer
    )
    assert text_tokens(config, llama).ids == expected


def test_missing_tokenizer_leaves_the_model_as_it_was(llama, tmp_path):
    with pytest.raises(ValueError, match="give `tokenizer_name_or_path`"):
        with_prefix(llama, init="text", init_text="x", tokenizer_name_or_path=str(tmp_path))
    assert not any("prefix_ext" in name for name, _ in llama.named_modules())
    with pytest.raises(ValueError, match="does not say where it came from"):
        with_prefix(llama, init="text", init_text="x")


def test_same_seed_same_prefix_and_another_seed_another(llama):
    def keys(seed):
        return [p.clone() for p in with_prefix(tiny_model("llama"), seed=seed).parameters() if p.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(keys(3), keys(3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(keys(3), keys(4), strict=True))
