"""The outputs of transformers with each prefix of the server, for tests of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import torch

from helpers.serving import support
from helpers.serving.server import MAX_MODEL_LEN, PREFIXES
from helpers.serving.support import WORDS, prompt_ids

MODELS = ["base", "pirate", "poet"]
PROMPT = prompt_ids(12)
EOS = WORDS.index("</s>")
# Returns the logits of the next token, given the logits, the prompt and the output so far.
Adjust = Callable[[torch.Tensor, list[int], list[int]], torch.Tensor]


class Oracle:
    """The outputs of transformers with each prefix."""

    def __init__(self, folder: Path) -> None:
        self._reference = support.Reference(folder / "model")

    def logprobs(self, model: str, tokens: list[int]) -> torch.Tensor:
        """Returns the log-probabilities of the next token after each of `tokens`: `[len(tokens), vocab_size]`."""
        return self._reference.logits(tokens, PREFIXES.get(model)).log_softmax(-1)

    def greedy(self, model: str, prompt: list[int], max_tokens: int = 6, adjust: Adjust | None = None) -> list[int]:
        output: list[int] = []
        for _ in range(max_tokens):
            logits = self._reference.logits([*prompt, *output], PREFIXES.get(model))[-1]
            output.append(int((logits if adjust is None else adjust(logits.clone(), prompt, output)).argmax()))
        return output

    def beams(self, model: str, prompt: list[int], width: int, max_tokens: int) -> list[list[int]]:
        return self._reference.beams(prompt, PREFIXES.get(model), width, max_tokens)


def post(client: openai.OpenAI, path: str, **body: Any) -> Any:
    return client.post(path, body=body, cast_to=object)


def forbidden(token_ids: list[int], until: int = MAX_MODEL_LEN) -> Adjust:
    """Forbids tokens in the first `until` tokens of the output."""

    def adjust(logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
        if len(output) < until:
            logits[token_ids] = -torch.inf
        return logits

    return adjust
