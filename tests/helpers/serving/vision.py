"""A tiny vision-language model with prefixes, in PEFT and in an engine, and prompts with pictures for both."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from vllm import SamplingParams

from helpers.prefixed import with_prefix
from helpers.serving.engines import start
from helpers.serving.vision_configs import CONTEXT, IMAGE, VISION_MODELS
from helpers.serving.vision_models import picture, processor, save, vision_model
from vllm_plugin import PrefixAdapterRequest, prefix_adapters

# With blocks of 32 tokens: shorter than a block, aligned, and longer than a block.
LENGTHS = (7, 32, 45)
NEW_TOKENS = 12
Answer = tuple[list[int], list[float]]


class Prompt(NamedTuple):
    """Text and pictures: the token ids hold the model's marker once for each picture."""

    token_ids: list[int]
    pictures: tuple[int, ...]


class ServedVision:
    """A base model with prefixes, the outputs of `PeftModel.generate` with each, and an engine.

    Args:
        name: As in `VISION_MODELS`.
        folder: An empty folder to save the models in.
        pictures: Whether prompts have pictures.
        settings: Settings of the engine.
    """

    def __init__(self, name: str, folder: Path, *, pictures: bool, **settings: Any) -> None:
        self.prompts = with_pictures(name) if pictures else _text_only()
        save(name, folder / "base")
        self._processor = processor(name) if pictures else None
        models: dict[str | None, Any] = {None: vision_model(name)}
        for length in LENGTHS:
            models[f"p{length}"] = with_prefix(vision_model(name), seed=length, num_virtual_tokens=length)
            models[f"p{length}"].save_pretrained(folder / f"p{length}")
        # The same prompts for each: only the prefix tells the answers apart, and the blocks.
        self.requests = [(adapter, prompt) for adapter in models for prompt in self.prompts]
        self.expected = [self._generate(models[adapter], prompt) for adapter, prompt in self.requests]
        limits = {"image": 2 if pictures else 0, **({"video": 0} if _knows_video(name) else {})}
        fixed = {
            "skip_tokenizer_init": False,
            "limit_mm_per_prompt": limits,
            "max_model_len": CONTEXT,
            "num_gpu_blocks_override": 256,
            **prefix_adapters({f"p{length}": str(folder / f"p{length}") for length in LENGTHS}),
        }
        self.llm = start(folder / "base", **{**fixed, **settings})

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def check(self) -> None:
        """Compares every token and log-probability with `PeftModel.generate`."""
        for (adapter, prompt), (tokens, logprobs), (expected, theirs) in zip(
            self.requests, self.answers(), self.expected, strict=True
        ):
            assert tokens == expected, (adapter, prompt)
            assert logprobs == pytest.approx(theirs, abs=2e-3), (adapter, prompt)

    def check_cases_differ(self) -> None:
        """Every two requests have answers that `check` tells apart: other prefixes, other pictures, or other text."""
        for (one, first), (other, second) in itertools.combinations(zip(self.requests, self.expected, strict=True), 2):
            same = first[0] == second[0] and second[1] == pytest.approx(first[1], abs=2e-2)
            assert not same, (one, other)

    def answers(self) -> list[Answer]:
        """Returns the tokens of every request and their log-probabilities."""
        outputs = self.llm.generate(
            [self.engine_prompt(prompt) for _, prompt in self.requests],
            SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0),
            lora_request=[name and PrefixAdapterRequest(name) for name, _ in self.requests],
            use_tqdm=False,
        )
        return [_answer(output.outputs[0]) for output in outputs]

    @staticmethod
    def engine_prompt(prompt: Prompt) -> dict[str, Any]:
        """Returns a prompt in vLLM's form."""
        media = {"multi_modal_data": {"image": [picture(seed) for seed in prompt.pictures]}} if prompt.pictures else {}
        return {"prompt_token_ids": list(prompt.token_ids), **media}

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm

    def _generate(self, model: Any, prompt: Prompt) -> Answer:
        if self._processor is None:
            ids = torch.tensor([prompt.token_ids])
            inputs: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            inputs = model_inputs(self._processor, prompt)
        return generate(model, inputs, NEW_TOKENS)


def model_inputs(processor: Any, prompt: Prompt) -> Any:
    """Returns what `transformers` makes of a prompt, with or without pictures."""
    text = " ".join(processor.tokenizer.convert_ids_to_tokens(prompt.token_ids))
    pictures = [picture(seed) for seed in prompt.pictures] or None
    return processor(text=[text], images=pictures, return_tensors="pt", add_special_tokens=False)


@torch.no_grad()
def generate(model: Any, inputs: Any, max_new_tokens: int) -> Answer:
    """Returns the greedy tokens of a model, with or without a prefix, and their log-probabilities."""
    for module in model.modules():
        # What the model kept of the last prompt with pictures.
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    rows = zip(output.logits, tokens, strict=True)
    return tokens, [float(logits[0].log_softmax(-1)[token]) for logits, token in rows]


def _answer(output: Any) -> Answer:
    tokens = list(output.token_ids)
    return tokens, [row[token].logprob for row, token in zip(output.logprobs, tokens, strict=True)]


def _knows_video(name: str) -> bool:
    return "qwen" in name or name == "internvl"


def _words(length: int, seed: int) -> list[int]:
    return torch.randint(3, IMAGE - 5, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _text_only() -> list[Prompt]:
    return [Prompt(_words(length, seed=length), ()) for length in (3, 40, 71)]


def with_pictures(name: str) -> list[Prompt]:
    """Returns prompts of the same text with other pictures, or the same pictures swapped, and one of text alone."""
    marker = VISION_MODELS[name].marker
    prompts = [Prompt(_words(40, seed=40), ())]
    for length, pictures in ((3, (1,)), (3, (2,)), (40, (1,)), (40, (3, 4)), (40, (4, 3))):
        words = []
        for number, _ in enumerate(pictures):
            words += [*_words(length, seed=length + number), *marker]
        prompts.append(Prompt([*words, *_words(5, seed=length)], pictures))
    return prompts
