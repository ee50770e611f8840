"""Answers and log-probabilities by `generate` and forward passes of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from peft_prefix_ext.base_model.layers import eval_mode
from peft_prefix_ext.generation.batching import IGNORED, answer_logits, pad_answers
from peft_prefix_ext.generation.generator import TokenIds, TopLogprobs, pad_token_of


class TransformersGenerator:
    """A `Generator` of a model in this process.

    Args:
        model: The base model, or a `PeftModel` whose prefixes are there already.
        tokenizer: Its tokenizer.
        batch_size: How many prompts are answered at a time.
        progress: Whether to show progress bars.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 16,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.progress = progress
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        ends: Any = base.generation_config.eos_token_id
        self.eos_token_ids: list[int] = [ends] if isinstance(ends, int) else list(ends or [])
        self.pad_token_id = pad_token_of(tokenizer)

    def add_prefix(self, name: str, folder: str | Path) -> None:
        if not isinstance(self.model, PeftModel):
            self.model = PeftModel.from_pretrained(self.model, str(folder), adapter_name=name)
            return
        if name in self.model.peft_config:
            self.model.delete_adapter(name)
        was_training = self.model.training
        self.model.load_adapter(str(folder), adapter_name=name)
        self.model.train(was_training)  # PEFT switches to eval mode

    def close(self) -> None:
        """Takes all prefixes off the model again."""
        if isinstance(self.model, PeftModel):
            unloaded: Any = self.model.unload()
            self.model = unloaded

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        max_new_tokens: int,
        prefix: str | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[TokenIds]:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_ids or None,
            **sampling,
        )
        answers: list[TokenIds] = [[] for _ in prompts]
        with self._active(prefix), self._generation_config(config), torch.random.fork_rng():
            torch.manual_seed(seed)
            for part in self._batches([len(prompt) for prompt in prompts], "Answering"):
                tokens = self._generate([prompts[index] for index in part])
                for index, row in zip(part, tokens, strict=True):
                    answers[index] = self._until_end(row)
        return answers

    @torch.no_grad()
    def score(
        self, prompts: Sequence[TokenIds], answers: Sequence[TokenIds], *, top_k: int, prefix: str | None = None
    ) -> list[TopLogprobs]:
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        scores: list[TopLogprobs] = [TopLogprobs([], [], []) for _ in prompts]
        with self._active(prefix):
            for part in self._batches(lengths, "Scoring"):
                chosen = [prompts[index] for index in part], [answers[index] for index in part]
                batch = {
                    name: tensor.to(self._device) for name, tensor in pad_answers(*chosen, self.pad_token_id).items()
                }
                logits = answer_logits(self.model, batch)
                k = min(top_k, logits.shape[-1])
                for row, index in enumerate(part):
                    logprobs = logits[row, batch["labels"][row] != IGNORED].float().log_softmax(dim=-1)
                    answer = logprobs.gather(-1, torch.tensor(answers[index], device=self._device)[:, None])[:, 0]
                    top = logprobs.topk(k)
                    scores[index] = TopLogprobs(top.indices.tolist(), top.values.tolist(), answer.tolist())
        return scores

    @property
    def _device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def _active(self, prefix: str | None) -> Iterator[None]:
        """Runs the model with one prefix, or none, and leaves it as it was."""
        before: Any = self.model.active_adapter if isinstance(self.model, PeftModel) else None
        with eval_mode(self.model):
            if not isinstance(self.model, PeftModel):
                yield
            elif prefix is None:
                with self.model.disable_adapter():
                    yield
            else:
                self.model.set_adapter(prefix)
                try:
                    yield
                finally:
                    self.model.set_adapter(before)

    @contextmanager
    def _generation_config(self, config: GenerationConfig) -> Iterator[None]:
        """Puts a config in place of the model's, which may hold penalties: answers are to be of its own distribution."""
        holders: list[Any] = [self.model]
        if isinstance(self.model, PeftModel):
            holders.append(self.model.get_base_model())
        before = [holder.generation_config for holder in holders]
        try:
            for holder in holders:
                holder.generation_config = config
            yield
        finally:
            for holder, own in zip(holders, before, strict=True):
                holder.generation_config = own

    def _batches(self, lengths: Sequence[int], title: str) -> Iterator[list[int]]:
        """Yields the indices of what has about the same length."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        with tqdm(total=len(order), desc=title, disable=not self.progress) as bar:
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                yield part
                bar.update(len(part))

    def _generate(self, prompts: Sequence[TokenIds]) -> list[TokenIds]:
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        rows = [[self.pad_token_id] * count + prompt for count, prompt in zip(padding, prompts, strict=True)]
        input_ids = torch.tensor(rows, device=self._device)
        attention_mask = torch.tensor([[0] * count + [1] * (width - count) for count in padding], device=self._device)
        model: Any = self.model
        tokens = model.generate(input_ids=input_ids, attention_mask=attention_mask)
        answers: list[TokenIds] = tokens[:, width:].tolist()
        return answers

    def _until_end(self, row: TokenIds) -> TokenIds:
        end = next((index + 1 for index, token in enumerate(row) if token in self.eos_token_ids), len(row))
        return row[:end]
