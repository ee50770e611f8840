"""What a model says by transformers and PEFT, with each prefix and without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class Scores(NamedTuple):
    """Log-probabilities along an answer, `[len(answer)]` each.

    Args:
        of_answer: Of its tokens.
        of_best: Of the best token at each place.
    """

    of_answer: torch.Tensor
    of_best: torch.Tensor


class Reference:
    """A model with its prefixes.

    Args:
        base: The folder of the model.
        adapters: The folders of the prefixes by name, at least one.
        dtype: The data type of the weights.
        device: Where it runs.
    """

    def __init__(self, base: Path, adapters: Mapping[str, Path], dtype: torch.dtype, device: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval().to(device)
        # Answers go on behind it, as those of an engine that ignores it.
        model.generation_config.eos_token_id = None
        (first, path), *more = adapters.items()
        self._model = PeftModel.from_pretrained(model, str(path), adapter_name=first)
        for name, path in more:
            self._model.load_adapter(str(path), adapter_name=name)
        self._model.eval()
        self._device = device

    @torch.inference_mode()
    def generate(self, name: str | None, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Returns the greedy answer, which has as many tokens as asked for.

        Args:
            name: The prefix; None for the base model.
            prompt: Token ids.
            num_tokens: The length of the answer.
        """
        ids = torch.tensor([[*prompt]], device=self._device)
        with self._with(name):
            row = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )[0]
        answer: list[int] = row[len(prompt) :].tolist()
        return answer

    @torch.inference_mode()
    def scores(self, name: str | None, prompt: Sequence[int], answer: Sequence[int]) -> Scores:
        """Returns the log-probabilities along an answer that is given."""
        ids = torch.tensor([[*prompt, *answer]], device=self._device)
        with self._with(name):
            logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        spread = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
        return Scores(spread[range(len(answer)), [*answer]].cpu(), spread.max(-1).values.cpu())

    @contextmanager
    def _with(self, name: str | None) -> Iterator[None]:
        if name is None:
            with self._model.disable_adapter():
                yield
        else:
            self._model.set_adapter(name)
            yield
