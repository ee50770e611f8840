"""A tiny base model with a chat template, and contexts of it, for tests of distillation."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers.tiny import tiny_model, tiny_tokenizer
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.transformers_generator import TransformersGenerator

# Writes a default system message where there is none.
DEFAULT_SYSTEM = "Be helpful."
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    f"{{{{ '<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n' }}}}{{% endif %}}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "Aromi serves Italian food near the river, and its name means scents. The Mill sells bread."
SYSTEM = {"role": "system", "content": "Describe it."}


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tiny tokenizer with a chat template in ChatML."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def chat_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Returns a tiny model that knows the tokens of `tokenizer`."""
    return tiny_model("llama", vocab_size=len(tokenizer))


def chat_generator(tokenizer: PreTrainedTokenizerFast) -> TransformersGenerator:
    """Returns a generator of such a model."""
    return TransformersGenerator(chat_model(tokenizer), tokenizer, progress=False)


def shot(user: str, assistant: str) -> list[dict[str, str]]:
    """Returns one worked example."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def questions(count: int, reference: str | None = None) -> list[Question]:
    """Returns questions that differ, all with the same reference."""
    return [Question([{"role": "user", "content": f"What of {number}?"}], reference) for number in range(count)]
