"""What OpenAI's API can ask of a server, asked of prefixes: each answer is the reference's, or the base model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from serving import support
from serving.server import PREFIXES
from serving.support import prompt_ids, text_of

MODELS = ["base", "pirate", "poet"]


@pytest.fixture(scope="module")
def reference(server_folder: Path) -> support.Reference:
    return support.Reference(server_folder / "model")


def prompt_logprobs(reference: support.Reference, model: str, prompt: list[int]) -> Any:
    """Returns the log-probability of every token at every position that predicts one of `prompt`: `[L - 1, vocab]`."""
    return reference.logits(prompt, PREFIXES.get(model)).log_softmax(-1)[:-1]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_prompts_as_lm_eval_asks(
    client: Any, reference: support.Reference, model: str, max_tokens: int
) -> None:
    """The form of lm-evaluation-harness' `local-completions`: batches of token ids, `echo` and one log-probability."""
    prompts = [prompt_ids(length, seed=length) for length in (1, 2, 31, 40, 100)]
    for _ in range(2):
        response = client.completions.create(
            model=model, prompt=prompts, max_tokens=max_tokens, logprobs=1, echo=True, temperature=0, seed=1234
        )
        for prompt, choice in zip(prompts, response.choices, strict=True):
            expected = prompt_logprobs(reference, model, prompt)
            first, *scores = choice.logprobs.token_logprobs[: len(prompt)]
            assert first is None
            assert scores == pytest.approx(
                expected.gather(1, torch.tensor(prompt[1:], dtype=torch.long)[:, None])[:, 0].tolist(), abs=1e-3
            )
            best = [max(top, key=top.get) for top in choice.logprobs.top_logprobs[1 : len(prompt)]]
            assert best == text_of(expected.argmax(-1).tolist()).split()
            assert choice.text.split()[: len(prompt)] == text_of(prompt).split()
            assert len(choice.logprobs.tokens) == len(prompt) + max_tokens
        assert response.usage.prompt_tokens == sum(map(len, prompts))
