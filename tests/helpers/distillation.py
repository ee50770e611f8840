"""A tiny base model with a chat template, and contexts of it, for tests of distillation."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers.chats import CHATML, tokenizer_with
from helpers.tiny import tiny_model
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.generation.transformers_generator import TransformersGenerator

TEXT = "Aromi serves Italian food near the river, and its name means scents. The Mill sells bread."
SYSTEM = {"role": "system", "content": "Describe it."}


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_with(CHATML)


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
