"""Trains a prefix with the `Trainer` of transformers, or reuses one trained with the same settings."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from e2e import Example, Message, Task
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_prefix_ext import PrefixExtConfig

IGNORED = -100  # the label of tokens outside of the answer
RECORD = "training.json"


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that affects the trained adapter; saved beside it, to reuse it until something changes."""

    model: str
    task: Task
    steps: int
    batch_size: int = 4
    learning_rate: float = 2e-3
    num_virtual_tokens: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Training:
    """A finished training: the folder of the adapter, the time it took, the loss of each step, and if it was reused."""

    folder: Path
    seconds: float
    losses: list[float]
    reused: bool


def train(settings: TrainingSettings, examples: Sequence[Example], folder: Path) -> Training:
    """Trains the prefix of a task on `examples` and saves it to `folder`, unless the same training is there already."""
    record = {"settings": asdict(settings), "data": _digest(examples)}
    path = folder / RECORD
    if path.exists() and (found := json.loads(path.read_text())).items() >= record.items():
        return Training(folder, found["seconds"], found["losses"], reused=True)
    path.unlink(missing_ok=True)

    set_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=fast_dtype())
    model = add_prefix(base, settings)
    model.print_trainable_parameters()
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            weight_decay=0.0,
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            seed=settings.seed,
        ),
        train_dataset=[encode(tokenizer, example) for example in examples],
        data_collator=Collator(tokenizer.pad_token_id),
        compute_loss_func=answer_loss,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model.save_pretrained(str(folder))

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Write last: a folder with a record holds a finished adapter.
    path.write_text(json.dumps({**record, "seconds": seconds, "losses": losses}))
    return Training(folder, seconds, losses, reused=False)


class LossBar(ProgressCallback):
    """A progress bar that shows the loss, instead of printing a line per step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.2f}")


def add_prefix(base: PreTrainedModel, settings: TrainingSettings) -> PeftModel:
    """Returns `base`, frozen, with a trainable prefix that is initialized from the text of the task.

    The MLP reparameterization needs half as many training steps as flat K/V. It is not saved.
    """
    config = PrefixExtConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=settings.num_virtual_tokens,
        init="text",
        init_text=settings.task.init_text,
        tokenizer_name_or_path=settings.model,
        reparam="mlp",
    )
    return get_peft_model(base, config)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Returns the tokens of a chat up to the start of the answer, as the server tokenizes it."""
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    # The chat template adds the special tokens.
    return list(tokenizer.encode(str(text), add_special_tokens=False))


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> dict[str, list[int]]:
    """Returns the tokens of an example, with labels for its answer only."""
    prompt = encode_prompt(tokenizer, example.messages)
    answer = [*tokenizer.encode(example.answer, add_special_tokens=False), tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the right, and requests logits only from the start of its first answer.

    With a large vocabulary and a small model, the unused logits of the prompts take a third of a step.
    """

    pad_token_id: int

    def __call__(self, batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(item["input_ids"]) for item in batch)
        input_ids = torch.tensor([_pad(item["input_ids"], length, self.pad_token_id) for item in batch])
        attention_mask = torch.tensor([_pad([1] * len(item["input_ids"]), length, 0) for item in batch])
        labels = torch.tensor([_pad(item["labels"], length, IGNORED) for item in batch])
        first = int((labels != IGNORED).any(0).nonzero()[0])
        # Logits at one position predict the token at the next.
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "logits_to_keep": torch.arange(first - 1, length - 1),
            "labels": labels[:, first:],
        }


def answer_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the mean loss over the tokens of the answers; the collator has aligned labels and logits."""
    return cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def fast_dtype() -> torch.dtype:
    """Returns bfloat16 if the hardware supports it, else float32. The prefix itself is always trained in float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def _pad(tokens: list[int], length: int, value: int) -> list[int]:
    return tokens + [value] * (length - len(tokens))


def _digest(examples: Sequence[Example]) -> str:
    text = json.dumps([[example.messages, example.answer] for example in examples])
    return hashlib.sha256(text.encode()).hexdigest()
