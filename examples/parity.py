"""Compares greedy answers of the server with `PeftModel.generate` in float32, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from serve import BASE, MAX_NEW_TOKENS, Answer, Question
from tqdm import tqdm
from train import encode_prompt
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_prefix_ext  # noqa: F401  (registers PREFIX_EXT with PEFT)


@torch.inference_mode()
def generate(model: str, adapters: Mapping[str, Path], questions: Sequence[Question]) -> list[Answer]:
    """Returns the answers of PEFT to `questions`, each generated with the prefix, or the base model, that it names."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    names = iter(adapters.items())
    name, folder = next(names)
    prefixed = PeftModel.from_pretrained(base, folder, adapter_name=name)
    for name, folder in names:
        prefixed.load_adapter(folder, adapter_name=name)
    prefixed.eval()

    answers = []
    for question in tqdm(questions, desc="PeftModel.generate"):
        prompt = encode_prompt(tokenizer, question.messages)
        input_ids = torch.tensor([prompt])
        if question.model != BASE:
            prefixed.set_adapter(question.model)
        with prefixed.disable_adapter() if question.model == BASE else nullcontext():
            output = prefixed.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        token_ids = output[0, len(prompt) :].tolist()
        text = str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip()
        answers.append(Answer(text, tuple(token_ids), tuple(prompt)))
    return answers


def count_equal(expected: Sequence[Answer], *served: Sequence[Answer]) -> int:
    """Returns how many answers have the expected prompt and answer tokens in every sequence of `served`."""
    return sum(
        all(_tokens(answer) == _tokens(want) for answer in answers)
        for want, *answers in zip(expected, *served, strict=True)
    )


def _tokens(answer: Answer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return answer.prompt_token_ids, answer.token_ids
