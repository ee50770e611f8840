"""Options of OpenAI's API with prefixes: every answer is compared token by token with the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.serving.oracle import MODELS, PROMPT, Adjust, Oracle, forbidden
from helpers.serving.server import complete
from helpers.serving.support import WORDS, prompt_ids, text_of


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_prompts_as_lm_eval_asks(client: Any, oracle: Oracle, model: str, max_tokens: int) -> None:
    """The form of lm-evaluation-harness' `local-completions`: batches of token ids, `echo` and one log-probability."""
    prompts = [prompt_ids(length, seed=length) for length in (1, 2, 31, 40, 100)]
    for _ in range(2):
        response = client.completions.create(
            model=model, prompt=prompts, max_tokens=max_tokens, logprobs=1, echo=True, temperature=0, seed=1234
        )
        for prompt, choice in zip(prompts, response.choices, strict=True):
            expected = oracle.logprobs(model, prompt)[:-1]
            first, *scores = choice.logprobs.token_logprobs[: len(prompt)]
            assert first is None
            targets = torch.tensor(prompt[1:], dtype=torch.long)[:, None]
            assert scores == pytest.approx(expected.gather(1, targets)[:, 0].tolist(), abs=1e-3)
            best = [max(top, key=top.get) for top in choice.logprobs.top_logprobs[1 : len(prompt)]]
            assert best == text_of(expected.argmax(-1).tolist()).split()
            assert choice.text.split()[: len(prompt)] == text_of(prompt).split()
            assert len(choice.logprobs.tokens) == len(prompt) + max_tokens
        assert response.usage.prompt_tokens == sum(map(len, prompts))


def test_prompt_logprobs_of_a_chat(client: Any, oracle: Oracle) -> None:
    response = client.chat.completions.create(
        model="poet",
        messages=[{"role": "user", "content": text_of(PROMPT)}],
        max_tokens=1,
        extra_body={"prompt_logprobs": 0, "return_token_ids": True},
    )
    assert response.prompt_token_ids == PROMPT
    scores = [next(iter(row.values()))["logprob"] for row in response.prompt_logprobs[1:]]
    expected = oracle.logprobs("poet", PROMPT)[range(len(PROMPT) - 1), PROMPT[1:]]
    assert scores == pytest.approx(expected.tolist(), abs=1e-3)


def repetition(logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
    seen = sorted({*prompt, *output})
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.8, logits[seen] * 1.8)
    return logits


def frequency(logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
    return logits - 1.2 * torch.bincount(torch.tensor(output, dtype=torch.long), minlength=len(logits))


def presence(logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
    logits[sorted(set(output))] -= 1.9
    return logits


@pytest.mark.parametrize(
    ("options", "adjust"),
    [
        ({"extra_body": {"repetition_penalty": 1.8}}, repetition),
        ({"frequency_penalty": 1.2}, frequency),
        ({"presence_penalty": 1.9}, presence),
        (
            {"frequency_penalty": 1.2, "presence_penalty": 1.9, "extra_body": {"repetition_penalty": 1.8}},
            lambda *args: presence(frequency(repetition(*args), *args[1:]), *args[1:]),
        ),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_penalties_are_about_real_tokens(
    client: Any, oracle: Oracle, model: str, options: dict[str, Any], adjust: Adjust
) -> None:
    # The placeholders repeat the first token.
    for prompt in (PROMPT, [oracle.greedy(model, PROMPT)[0], *PROMPT]):
        (choice,) = complete(client, model, prompt, 12, **options).choices
        assert choice.text.split() == text_of(oracle.greedy(model, prompt, 12, adjust)).split()


@pytest.mark.parametrize("model", MODELS)
def test_forbidden_tokens(client: Any, oracle: Oracle, model: str) -> None:
    first, second, third, *_ = oracle.greedy(model, PROMPT)
    for options, adjust in (
        ({"logit_bias": {str(first): -100}}, forbidden([first])),
        ({"extra_body": {"bad_words": [WORDS[first]]}}, forbidden([first])),
        ({"extra_body": {"allowed_token_ids": list(range(50, 90))}}, forbidden([*range(50), *range(90, len(WORDS))])),
        ({"extra_body": {"stop_token_ids": [first, second], "min_tokens": 4}}, forbidden([first, second], until=4)),
    ):
        expected = oracle.greedy(model, PROMPT, 4, adjust)
        assert complete(client, model, PROMPT, 4, **options).choices[0].text.split() == text_of(expected).split()
    (choice,) = complete(client, model, PROMPT, extra_body={"stop_token_ids": [third]}).choices
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == third


@pytest.mark.parametrize("model", MODELS)
def test_stop_ends_an_answer(client: Any, oracle: Oracle, model: str) -> None:
    whole = complete(client, model, PROMPT).choices[0].text
    stop = WORDS[oracle.greedy(model, PROMPT)[2]]
    (choice,) = complete(client, model, PROMPT, stop=[stop]).choices
    assert choice.text == whole[: whole.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("model", MODELS)
def test_n_answers_to_one_prompt(client: Any, oracle: Oracle, model: str) -> None:
    response = complete(client, model, PROMPT, n=3, extra_body={"top_k": 1, "temperature": 1.0})
    assert {choice.text for choice in response.choices} == {response.choices[0].text}
    assert response.choices[0].text.split() == text_of(oracle.greedy(model, PROMPT)).split()
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (len(PROMPT), 3 * 6)
    options = {"n": 3, "seed": 5, "extra_body": {"temperature": 1.5}}
    some, again = ([choice.text for choice in complete(client, model, PROMPT, **options).choices] for _ in range(2))
    assert some == again
    assert len(set(some)) == 3


@pytest.mark.parametrize("model", MODELS)
def test_beams(client: Any, oracle: Oracle, model: str) -> None:
    response = complete(client, model, PROMPT, 5, n=3, extra_body={"use_beam_search": True})
    assert [choice.text.split() for choice in response.choices] == [
        text_of(output).split() for output in oracle.beams(model, PROMPT, 3, 5)
    ]
    assert response.usage.prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("model", MODELS)
def test_logprobs_of_answers(client: Any, oracle: Oracle, model: str) -> None:
    expected = oracle.greedy(model, PROMPT)
    scores = oracle.logprobs(model, PROMPT + expected)[len(PROMPT) - 1 : -1]
    best = scores.topk(3)
    (choice,) = complete(client, model, PROMPT, logprobs=3).choices
    assert choice.logprobs.token_logprobs == pytest.approx(best.values[:, 0].tolist(), abs=1e-3)
    for top, words, values in zip(choice.logprobs.top_logprobs, best.indices, best.values, strict=True):
        assert top == pytest.approx(dict(zip(text_of(words.tolist()).split(), values.tolist(), strict=True)), abs=1e-3)
    (choice,) = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text_of(PROMPT)}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    ).choices
    for token, values in zip(choice.logprobs.content, best.values.tolist(), strict=True):
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(values, abs=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_structured_outputs(client: Any, oracle: Oracle, model: str) -> None:
    choices = [5, 9, 40, 77]
    first = oracle.greedy(model, PROMPT, 1, forbidden(sorted({*range(len(WORDS))} - {*choices})))
    for constraint in ({"choice": text_of(choices).split()}, {"regex": "|".join(text_of(choices).split())}):
        (choice,) = complete(
            client, model, PROMPT, extra_body={"structured_outputs": constraint, "ignore_eos": False}
        ).choices
        assert choice.text.split()[:1] == text_of(first).split()
        assert choice.finish_reason == "stop"
