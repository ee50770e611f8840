"""One way to train, to measure the loss and to generate, the same for every method.

The loop is short on purpose: what a method needs beyond it would be an advantage that the others do not have.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from benchmarks.quality.dataset import Pair, answer_of, prompt_of

IGNORED = -100  # the label of a token that is no part of an answer
WARMUP = 0.1  # of the steps: the learning rate rises, then falls to zero as a cosine
LENGTH_POOL = 8  # batches out of which rows of like length are put together
MAX_NEW_TOKENS = 60
GENERATION_BATCH = 64


@dataclass(frozen=True)
class Encoded:
    """A pair as tokens."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def encode(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> Encoded:
    prompt = tokenizer.encode(prompt_of(pair.meaning), add_special_tokens=False)
    answer = tokenizer.encode(answer_of(pair.sentence), add_special_tokens=False)
    return Encoded(prompt, [*answer, tokenizer.eos_token_id])


def batches(rows: Sequence[Encoded], size: int, steps: int, seed: int) -> Iterator[list[Encoded]]:
    """Yields `steps` batches: each row once per epoch, in an order that only `seed` decides, like lengths together."""
    order = random.Random(seed)
    waiting: list[list[Encoded]] = []
    left: list[Encoded] = []
    for _ in range(steps):
        if not waiting:
            while len(left) < size * LENGTH_POOL:
                left += order.sample(rows, len(rows))
            pool, left = left[: size * LENGTH_POOL], left[size * LENGTH_POOL :]
            pool.sort(key=len)
            waiting = [pool[start : start + size] for start in range(0, len(pool), size)]
            order.shuffle(waiting)
        yield waiting.pop()


def answer_loss(model: torch.nn.Module, batch: Sequence[Encoded], pad: int) -> torch.Tensor:
    """Returns the mean loss over the tokens of the answers."""
    length = max(map(len, batch))
    first = min(len(row.prompt) for row in batch)
    input_ids = torch.full((len(batch), length), pad)
    attention_mask = torch.zeros((len(batch), length), dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORED)
    for index, row in enumerate(batch):
        input_ids[index, : len(row)] = torch.tensor(row.prompt + row.answer)
        attention_mask[index, : len(row)] = 1
        labels[index, len(row.prompt) : len(row)] = torch.tensor(row.answer)
    # The logits at a position predict the token of the next one; those of the prompts nobody looks at.
    keep = torch.arange(first - 1, length - 1)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, first:].flatten(), ignore_index=IGNORED)


def train(
    model: PeftModel, rows: Sequence[Encoded], *, learning_rate: float, size: int, steps: int, seed: int, pad: int
) -> list[float]:
    """Trains what is trainable, by AdamW without weight decay, and returns the loss of each step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    model.train()
    losses = []
    for batch in batches(rows, size, steps, seed):
        loss = answer_loss(model, batch, pad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def mean_loss(model: PeftModel, rows: Sequence[Encoded], size: int, pad: int) -> float:
    """Returns the mean over the rows of the loss per token of the answer, in batches of `size`."""
    model.eval()
    ordered = sorted(rows, key=len)
    parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return sum(answer_loss(model, part, pad).item() * len(part) for part in parts) / len(rows)


@torch.inference_mode()
def generate(model: Any, tokenizer: PreTrainedTokenizerBase, meanings: Sequence[str]) -> list[str]:
    """Returns the greedy answer to each meaning representation, in order."""
    model.eval()
    prompts = [tokenizer.encode(prompt_of(meaning), add_special_tokens=False) for meaning in meanings]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), GENERATION_BATCH):
        part = order[start : start + GENERATION_BATCH]
        inputs = tokenizer.pad({"input_ids": [prompts[i] for i in part]}, padding_side="left", return_tensors="pt")
        tokens = model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        for index, row in zip(part, tokens[:, inputs["input_ids"].shape[1] :], strict=True):
            answers[index] = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
    return answers
