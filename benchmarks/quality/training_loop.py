"""Training, loss and generation, the same for every method.

The loop is deliberately minimal, so that no method gets a recipe tuned for it.
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

IGNORED = -100  # the label of tokens that are not part of an answer
WARMUP = 0.1  # share of the steps; a cosine decay to zero follows
LENGTH_POOL = 8  # batches whose rows are sorted by length together, to save padding
MAX_NEW_TOKENS = 60
GENERATION_BATCH = 64


@dataclass(frozen=True)
class Encoded:
    """The token ids of a pair."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def encode(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> Encoded:
    prompt = tokenizer.encode(prompt_of(pair.meaning, pair.label), add_special_tokens=False)
    answer = tokenizer.encode(answer_of(pair.sentence), add_special_tokens=False)
    return Encoded(prompt, [*answer, tokenizer.eos_token_id])


def batches(rows: Sequence[Encoded], size: int, steps: int, seed: int) -> Iterator[list[Encoded]]:
    """Yields `steps` batches of similar length, with each row once per epoch; `seed` alone determines the order."""
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
    """Returns the mean loss over the answers' tokens."""
    length = max(map(len, batch))
    first = min(len(row.prompt) for row in batch)
    input_ids = torch.full((len(batch), length), pad)
    attention_mask = torch.zeros((len(batch), length), dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORED)
    for index, row in enumerate(batch):
        input_ids[index, : len(row)] = torch.tensor(row.prompt + row.answer)
        attention_mask[index, : len(row)] = 1
        labels[index, len(row.prompt) : len(row)] = torch.tensor(row.answer)
    # Logits at a position predict the next token. Those before the shortest prompt ends are not needed.
    keep = torch.arange(first - 1, length - 1)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, first:].flatten(), ignore_index=IGNORED)


def train(
    model: PeftModel, rows: Sequence[Encoded], *, learning_rate: float, size: int, steps: int, seed: int, pad: int
) -> list[float]:
    """Trains with AdamW, without weight decay, and returns the loss of each step."""
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
    """Returns the mean loss per answer token, averaged over batches of `size` rows and weighted by their rows."""
    model.eval()
    ordered = sorted(rows, key=len)
    parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return sum(answer_loss(model, part, pad).item() * len(part) for part in parts) / len(rows)


@torch.inference_mode()
def generate(model: Any, tokenizer: PreTrainedTokenizerBase, meanings: Sequence[str]) -> list[str]:
    """Returns the greedy answer to each meaning representation."""
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
