"""Prompts of examples, their right answers, and what the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from peft_prefix_ext.generation.generator import TokenIds, text_of
from peft_prefix_ext.generation.prompts import prompt_ids
from peft_prefix_ext.generation.transformers_generator import TransformersGenerator
from peft_prefix_ext.training.columns import Row

ADAPTER = "default"


@dataclass(frozen=True)
class Sample:
    """An answer.

    Args:
        prompt: What the model was asked.
        expected: The right answer.
        answer: What it answered.
    """

    prompt: str
    expected: str
    answer: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def prompt_of(row: Row, tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """Returns the prompt of an example in tokens, as `SFTTrainer` makes it; of a text its first half."""
    prompt: Any = row.get("prompt")
    if isinstance(prompt, list):
        return prompt_ids(tokenizer, prompt)
    ids = tokenizer(prompt if prompt is not None else row["text"]).input_ids
    return list(ids) if prompt is not None else list(ids[: max(1, len(ids) // 2)])


def split_tokens(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenIds, TokenIds]:
    """Returns the tokens of an example without and with loss, as `SFTTrainer` splits them; of a text the first and the rest."""
    prompt: Any = row.get("prompt")
    if isinstance(prompt, list):
        whole = tokenizer.apply_chat_template([*prompt, *row["completion"]], tokenize=False)
        ids = list(tokenizer(str(whole), add_special_tokens=False).input_ids)
    else:
        text = row["text"] if prompt is None else prompt + row["completion"]
        end = str(tokenizer.eos_token or "")
        ids = list(tokenizer(text if text.endswith(end) else text + end).input_ids)
    start = 1
    if prompt is not None:
        alone = prompt_of(row, tokenizer)
        # They part earlier where the last token of the prompt is another one with the answer behind it.
        start = next(
            (index for index, pair in enumerate(zip(alone, ids, strict=False)) if pair[0] != pair[1]), len(alone)
        )
    return ids[:start], ids[start:]


def merges(row: Row, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens of an example's prompt are other ones once the answer follows: then no request ends as it was trained."""
    return "prompt" in row and len(split_tokens(row, tokenizer)[0]) < len(prompt_of(row, tokenizer))


def texts_of(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Returns what an example asks and what it expects, as texts."""
    if "text" in row:
        ids = tokenizer(row["text"]).input_ids
        start = len(prompt_of(row, tokenizer))
        return text_of(tokenizer, ids[:start]), text_of(tokenizer, ids[start:])
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        return str(prompt[-1]["content"]), "".join(str(message["content"]) for message in completion)
    return prompt, completion.strip()


def answer_examples(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    prefix: str | None = ADAPTER,
    batch_size: int = 8,
    progress: bool = False,
) -> list[Sample]:
    """Returns the greedy answers to the prompts of examples.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: The examples.
        max_new_tokens: The length of the longest answer, in tokens.
        prefix: The name of the adapter, `None` for the base model alone.
        batch_size: How many are answered at a time.
        progress: Whether to show a progress bar.
    """
    generator = TransformersGenerator(model, tokenizer, batch_size=batch_size, progress=progress)
    prompts = [prompt_of(row, tokenizer) for row in rows]
    answers = generator.generate(prompts, max_new_tokens=max_new_tokens, prefix=prefix)
    return [
        Sample(*texts_of(row, tokenizer), text_of(tokenizer, answer)) for row, answer in zip(rows, answers, strict=True)
    ]
