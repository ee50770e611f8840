"""What OpenAI's API can ask of a server, asked of prefixes: every answer is what the reference says, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from helpers.serving import support
from helpers.serving.server import MAX_MODEL_LEN, PREFIXES, complete
from helpers.serving.support import WORDS, prompt_ids, text_of

MODELS = ["base", "pirate", "poet"]
PROMPT = prompt_ids(12)
EOS = WORDS.index("</s>")
# Of the tokens so far, prompt and output, to the logits of the next.
Adjust = Callable[[torch.Tensor, list[int], list[int]], torch.Tensor]


class Oracle:
    """What transformers says after each prefix."""

    def __init__(self, folder: Path) -> None:
        self._reference = support.Reference(folder / "model")

    def logprobs(self, model: str, tokens: list[int]) -> torch.Tensor:
        """Returns the log-probabilities of what comes after each of `tokens`: `[len(tokens), vocab_size]`."""
        return self._reference.logits(tokens, PREFIXES.get(model)).log_softmax(-1)

    def greedy(self, model: str, prompt: list[int], max_tokens: int = 6, adjust: Adjust | None = None) -> list[int]:
        output: list[int] = []
        for _ in range(max_tokens):
            logits = self._reference.logits([*prompt, *output], PREFIXES.get(model))[-1]
            output.append(int((logits if adjust is None else adjust(logits.clone(), prompt, output)).argmax()))
        return output

    def beams(self, model: str, prompt: list[int], width: int, max_tokens: int) -> list[list[int]]:
        return self._reference.beams(prompt, PREFIXES.get(model), width, max_tokens)


@pytest.fixture(scope="module")
def oracle(server_folder: Path) -> Oracle:
    return Oracle(server_folder)


def post(client: openai.OpenAI, path: str, **body: Any) -> Any:
    return client.post(path, body=body, cast_to=object)


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


def forbidden(token_ids: list[int], until: int = MAX_MODEL_LEN) -> Adjust:
    def adjust(logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
        if len(output) < until:
            logits[token_ids] = -torch.inf
        return logits

    return adjust


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
    # The first token is the one that stands for virtual tokens.
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


@pytest.mark.parametrize("model", MODELS)
def test_streamed_text_equals_the_whole_answer(client: Any, oracle: Oracle, model: str) -> None:
    chunks = list(
        complete(
            client, model, PROMPT, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
        )
    )
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text.split() == text_of(oracle.greedy(model, PROMPT)).split()
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {len(PROMPT)}
    assert chunks[-1].usage.completion_tokens == 6


@pytest.mark.parametrize("model", MODELS)
def test_prompts_are_truncated_on_request(client: Any, oracle: Oracle, model: str) -> None:
    for side, kept in (("left", PROMPT[-5:]), ("right", PROMPT[:5])):
        response = complete(
            client, model, text_of(PROMPT), extra_body={"truncate_prompt_tokens": 5, "truncation_side": side}
        )
        assert response.choices[0].text.split() == text_of(oracle.greedy(model, kept)).split()
        assert response.usage.prompt_tokens == 5


@pytest.mark.parametrize("model", MODELS)
def test_prompts_are_truncated_to_the_context(client: Any, oracle: Oracle, model: str) -> None:
    long = prompt_ids(MAX_MODEL_LEN + 20)
    room = MAX_MODEL_LEN - (PREFIXES[model][0][0].shape[1] if model in PREFIXES else 0)
    options = {"truncate_prompt_tokens": -1, "truncation_side": "left"}
    response = complete(client, model, text_of(long), extra_body=options)
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (room - 1, 1)
    expected = oracle.greedy(model, long[1 - room :], 1)
    assert response.choices[0].text.split() == text_of(expected).split()
    chat = {"messages": [{"role": "user", "content": text_of(long)}], "max_tokens": 6, "temperature": 0}
    assert client.chat.completions.create(model=model, extra_body=options, **chat).usage.prompt_tokens == room - 1
    response = client.responses.create(
        model=model, input=text_of(long), max_output_tokens=6, temperature=0, truncation="auto"
    )
    assert (response.usage.input_tokens, response.usage.output_tokens) == (room - 1, 1)
    # The tokenizer's first three words are special: an answer does not show them.
    assert response.output_text.split() == text_of([token for token in expected if token > 2]).split()
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model=model, input=text_of(long), max_output_tokens=6)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, extra_body={"truncation": "auto", "prefix_prompt_limit": 5}, **chat)


@pytest.mark.parametrize("model", MODELS)
def test_echo_and_token_ids_hold_no_virtual_token(client: Any, oracle: Oracle, model: str) -> None:
    expected = oracle.greedy(model, PROMPT)
    (choice,) = complete(client, model, PROMPT, echo=True).choices
    assert choice.text.split() == text_of(PROMPT + expected).split()
    (choice,) = complete(client, model, PROMPT, extra_body={"return_token_ids": True}).choices
    assert (choice.prompt_token_ids, choice.token_ids) == (PROMPT, expected)


@pytest.mark.parametrize("model", MODELS)
def test_responses_and_messages(client: Any, oracle: Oracle, model: str) -> None:
    expected = text_of(oracle.greedy(model, PROMPT)).split("</s>")[0].split()
    response = client.responses.create(model=model, input=text_of(PROMPT), max_output_tokens=6, temperature=0)
    assert response.output_text.split() == expected
    assert response.usage.input_tokens == len(PROMPT)
    events = client.responses.create(
        model=model, input=text_of(PROMPT), max_output_tokens=6, temperature=0, stream=True
    )
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas).split() == expected
    message = post(
        client,
        "/messages",
        model=model,
        messages=[{"role": "user", "content": text_of(PROMPT)}],
        max_tokens=6,
        temperature=0,
    )
    assert message["content"][0]["text"].split() == expected
    assert message["usage"]["input_tokens"] == len(PROMPT)


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_of_chats(client: Any, oracle: Oracle, model: str) -> None:
    prompts = [PROMPT, PROMPT[:5]]
    chats = [[{"role": "user", "content": text_of(prompt)}] for prompt in prompts]
    options = {"temperature": 0, "logit_bias": {EOS: -100}, "return_token_ids": True}
    response = post(client, "/chat/completions/batch", model=model, messages=chats, max_tokens=6, **options)
    for prompt, choice in zip(prompts, response["choices"], strict=True):
        assert choice["token_ids"] == oracle.greedy(model, prompt, adjust=forbidden([EOS]))
    assert response["usage"]["prompt_tokens"] == sum(map(len, prompts))
    room = MAX_MODEL_LEN - (PREFIXES[model][0][0].shape[1] if model in PREFIXES else 0)
    response = post(client, "/chat/completions/batch", model=model, messages=chats[:1], **options)
    assert response["usage"]["completion_tokens"] == room - len(PROMPT)


def test_tokenize_shows_real_tokens(client: Any) -> None:
    for model in MODELS:
        assert post(client, "/../tokenize", model=model, prompt=text_of(PROMPT))["tokens"] == PROMPT
        assert post(client, "/../detokenize", model=model, tokens=PROMPT)["prompt"] == text_of(PROMPT)
