"""A vision-language model over HTTP: pictures in chats with a prefix, and what clients may not send."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from helpers.prefixed import with_prefix
from helpers.serving.server import MAX_MODEL_LEN, serve
from helpers.serving.vision import Answer, Prompt, generate, model_inputs
from helpers.serving.vision_configs import VISION_MODELS
from helpers.serving.vision_models import picture, processor, save, vision_model

MODEL = "qwen2_5_vl"
LENGTHS = {"pirate": 32, "poet": 7}
NEW_TOKENS = 8
TEXT = ["w5 w9 w17", "w21 w4"]


class Expected:
    """The outputs of the base model and of `PeftModel.generate` with each prefix; saves what the server needs."""

    def __init__(self, folder: Path) -> None:
        save(MODEL, folder / "model")
        self._processor = processor(MODEL)
        self._models: dict[str, Any] = {"base": vision_model(MODEL)}
        for name, length in LENGTHS.items():
            self._models[name] = with_prefix(vision_model(MODEL), seed=length, num_virtual_tokens=length)
            self._models[name].save_pretrained(folder / name)

    def prompt(self, pictures: list[int]) -> Prompt:
        """Returns what the chat template makes of `messages`."""
        convert = self._processor.tokenizer.convert_tokens_to_ids
        before, after = (convert(text.split()) for text in TEXT)
        return Prompt([*before, *len(pictures) * VISION_MODELS[MODEL].marker, *after], tuple(pictures))

    def answer(self, model: str, pictures: list[int]) -> Answer:
        return generate(self._models[model], model_inputs(self._processor, self.prompt(pictures)), NEW_TOKENS)

    @torch.no_grad()
    def logits(self, model: str, pictures: list[int]) -> torch.Tensor:
        """Returns the logits at every position of the prompt."""
        return self._models[model](**model_inputs(self._processor, self.prompt(pictures))).logits[0]

    def prompt_ids(self, pictures: list[int]) -> list[int]:
        return model_inputs(self._processor, self.prompt(pictures))["input_ids"][0].tolist()


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def expected(vision_folder: Path) -> Expected:
    return Expected(vision_folder)


@pytest.fixture(scope="module")
def vision_client(expected: Expected, vision_folder: Path) -> Iterator[openai.OpenAI]:
    limits = ("--limit-mm-per-prompt", '{"image": 2, "video": 0}')
    with serve(vision_folder, *limits, adapters={name: vision_folder / name for name in LENGTHS}) as client:
        yield client


def data_url(seed: int) -> str:
    buffer = io.BytesIO()
    picture(seed).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def messages(*parts: dict[str, Any]) -> list[Any]:
    before, after = ({"type": "text", "text": text} for text in TEXT)
    return [{"role": "user", "content": [before, *parts, after]}]


def chat(client: openai.OpenAI, model: str, pictures: list[int], **options: Any) -> Any:
    parts = [{"type": "image_url", "image_url": {"url": data_url(seed)}} for seed in pictures]
    return client.chat.completions.create(
        model=model,
        messages=messages(*parts),
        **{"max_tokens": NEW_TOKENS, "temperature": 0, **options},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )


def test_pictures_in_a_chat(vision_client: openai.OpenAI, expected: Expected) -> None:
    answers = {}
    for model in ("base", *LENGTHS):
        for pictures in ([1], [2], [1, 2], [2, 1], []):
            answer = chat(vision_client, model, pictures)
            tokens, _ = expected.answer(model, pictures)
            assert answer.choices[0].token_ids == tokens, (model, pictures)
            assert answer.prompt_token_ids == expected.prompt_ids(pictures)
            assert answer.usage.prompt_tokens == len(answer.prompt_token_ids)
            answers[model, tuple(pictures)] = tokens
    # Prefixes are told apart, and pictures: not by every token, but by the answer.
    for pictures in ((1,), (2,), (1, 2), (2, 1)):
        assert len({tuple(answers[model, pictures]) for model in ("base", *LENGTHS)}) == 3
    for model in ("base", *LENGTHS):
        assert len({tuple(answers[model, pictures]) for pictures in ((1,), (2,), (1, 2), (2, 1), ())}) == 5


def test_prompt_logprobs_behind_pictures(vision_client: openai.OpenAI, expected: Expected) -> None:
    answer = vision_client.chat.completions.create(
        model="poet",
        messages=messages({"type": "image_url", "image_url": {"url": data_url(1)}}),
        max_tokens=1,
        extra_body={"prompt_logprobs": 0, "return_token_ids": True},
    )
    assert answer.prompt_token_ids == expected.prompt_ids([1])
    logits = expected.logits("poet", [1]).log_softmax(-1)
    scores = [next(iter(row.values()))["logprob"] for row in answer.prompt_logprobs[1:]]
    targets = answer.prompt_token_ids[1:]
    assert scores == pytest.approx(logits[range(len(targets)), targets].tolist(), abs=2e-3)


def test_embeddings_of_clients_stay_out(vision_client: openai.OpenAI, expected: Expected) -> None:
    buffer = io.BytesIO()
    torch.save(torch.zeros(16, 128), buffer)
    tensor = base64.b64encode(buffer.getvalue()).decode()
    grid = {"image_grid_thw": tensor}
    for model in ("base", *LENGTHS):
        for embeds in (tensor, {"image_embeds": tensor, **grid}, grid, None):
            with pytest.raises(openai.BadRequestError, match="You must set `--enable-mm-embeds`"):
                vision_client.chat.completions.create(
                    model=model, messages=messages({"type": "image_embeds", "image_embeds": embeds}), max_tokens=1
                )
        with pytest.raises(openai.BadRequestError, match="You must set `--enable-prompt-embeds`"):
            vision_client.completions.create(
                model=model, prompt=None, max_tokens=1, extra_body={"prompt_embeds": tensor}
            )
        assert chat(vision_client, model, [1]).choices[0].token_ids == expected.answer(model, [1])[0]


def test_pictures_count_in_the_length_of_a_prompt(vision_client: openai.OpenAI, expected: Expected) -> None:
    length = len(expected.prompt_ids([1, 2]))
    text = " ".join(["w7"] * (MAX_MODEL_LEN - LENGTHS["pirate"] - length))
    parts = [{"type": "image_url", "image_url": {"url": data_url(seed)}} for seed in (1, 2)]
    with pytest.raises(openai.BadRequestError, match="leave no room for an output token") as caught:
        vision_client.chat.completions.create(
            model="pirate", messages=messages(*parts, {"type": "text", "text": text}), max_tokens=1
        )
    assert f"{MAX_MODEL_LEN - LENGTHS['pirate']} tokens, media included" in str(caught.value)
    fits = text.removesuffix(" w7")
    answer = vision_client.chat.completions.create(
        model="pirate", messages=messages(*parts, {"type": "text", "text": fits}), max_tokens=5
    )
    assert answer.usage.completion_tokens == 1
