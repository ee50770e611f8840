"""`init="text"`: at step 0 the model gives the same logits as with the text in its context."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig
from peft_prefix_ext.initialization.tokens import text_tokens

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
    config = PrefixExtConfig(
        num_virtual_tokens=length, init="text", init_text=WORDS, tokenizer_name_or_path=word_tokenizer
    )
    assert text_tokens(config, llama).ids == expected


@pytest.mark.parametrize(
    ("length", "expected", "report"),
    [
        (4, [93, 5, 17, 8], "(5 tokens, cut)"),
        (5, [93, 5, 17, 40, 8], "(5 tokens)"),
        (7, [93, 5, 17, 40, 5, 17, 8], "(5 tokens, repeated)"),
        (2, [93, 5], "(5 tokens, cut)"),
        (1, [93], "(5 tokens, cut)"),
    ],
)
def test_a_system_message_is_whole_at_any_length(length, expected, report, chat_tokenizer, llama):
    config = PrefixExtConfig(
        num_virtual_tokens=length,
        init="text",
        init_text="w5 w17 w40",
        init_chat_template=True,
        tokenizer_name_or_path=chat_tokenizer,
    )
    assert text_tokens(config, llama) == (expected, f"system message 'w5 w17 w40' {report}")


def test_a_system_message_has_the_tokens_of_the_template(subword_tokenizer, llama, tmp_path):
    """Also if tokens of the text and of the template merge at their boundary."""
    subword_tokenizer.chat_template = "<s>{% for m in messages %}name:{{ m['content'] }}serves</s>{% endfor %}"
    subword_tokenizer.save_pretrained(tmp_path)
    text = " Aromi, food: Italian "
    expected = subword_tokenizer(f"<s>name:{text}serves</s>", add_special_tokens=False).input_ids
    config = {"init": "text", "init_text": text, "init_chat_template": True, "tokenizer_name_or_path": str(tmp_path)}
    assert text_tokens(PrefixExtConfig(num_virtual_tokens=len(expected), **config), llama).ids == expected
    longer = text_tokens(PrefixExtConfig(num_virtual_tokens=len(expected) + 3, **config), llama).ids
    assert longer[0] == expected[0]
    assert longer[-1] == expected[-1]
    assert len(longer) == len(expected) + 3


@pytest.mark.parametrize("content", ["part['text']", "part.get('text')"], ids=["left out", "fails"])
def test_a_template_that_takes_parts(content, word_tokenizer, llama, tmp_path):
    """As those of vision-language models, which a text would be left out of, or fail."""
    tokenizer = AutoTokenizer.from_pretrained(word_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}w93 {% for part in m['content'] %}{{ " + content + " }}{% endfor %} w8{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    settings = {"init_text": "w5 w17", "init_chat_template": True, "tokenizer_name_or_path": str(tmp_path)}
    assert text_tokens(PrefixExtConfig(num_virtual_tokens=4, **settings), llama).ids == [93, 5, 17, 8]


def test_a_template_without_system_messages_is_refused(chat_tokenizer, word_tokenizer, llama, tmp_path):
    def refused(tokenizer, message):
        with pytest.raises(ValueError, match=message):
            with_prefix(llama, init="text", init_text="w5", init_chat_template=True, tokenizer_name_or_path=tokenizer)

    refused(word_tokenizer, "cannot be rendered by the tokenizer's chat template")
    tokenizer = AutoTokenizer.from_pretrained(word_tokenizer)
    for number, (template, message) in enumerate(
        [
            ("{{ raise_exception('System role not supported') }}", "chat template .System role not supported"),
            ("w3", "`init_text` is not in what the tokenizer's chat template makes of a system message"),
        ]
    ):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / str(number))
        refused(str(tmp_path / str(number)), message)


def test_missing_tokenizer_leaves_the_model_as_it_was(llama, tmp_path):
    with pytest.raises(ValueError, match="give `tokenizer_name_or_path`"):
        with_prefix(llama, init="text", init_text="x", tokenizer_name_or_path=str(tmp_path))
    assert not any("prefix_ext" in name for name, _ in llama.named_modules())
    with pytest.raises(ValueError, match="does not say where it came from"):
        with_prefix(llama, init="text", init_text="x")


def test_the_seed_determines_the_prefix(llama):
    def keys(seed):
        return [p.clone() for p in with_prefix(tiny_model("llama"), seed=seed).parameters() if p.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(keys(3), keys(3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(keys(3), keys(4), strict=True))
