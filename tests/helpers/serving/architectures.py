"""A tiny base model of any architecture with prefixes, in PEFT and in an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from vllm import SamplingParams

from helpers.prefixed import with_prefix
from helpers.serving.engines import start
from helpers.tiny import random_ids, tiny_model
from vllm_plugin import PrefixAdapterRequest, prefix_adapters

LENGTHS = (7, 32, 45)
PROMPT_LENGTHS = (3, 40, 71)  # the windows of the sliding layers are 24
NEW_TOKENS = 16
# The longest request fills the context, and therefore uses all learned positions. The CPU engine has no kernel for
# heads smaller than 32.
CONTEXT = max(LENGTHS) + max(PROMPT_LENGTHS) + NEW_TOKENS
SIZES = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": CONTEXT}
Request = tuple[str | None, list[int]]
Answer = tuple[list[int], list[float]]
# Returns the answer to a prompt.
Reference = Callable[[list[int]], Answer]


class Served:
    """A base model with prefixes, the outputs of `PeftModel.generate` with each, and an engine.

    Args:
        name: As in `tiny.CONFIGS`.
        folder: An empty folder to save the models in.
        config: Fields of the config that differ; `...` removes a field.
        settings: Settings of the engine.
    """

    prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS
    # Of log-probabilities.
    tolerance = 2e-3

    def __init__(self, name: str, folder: Path, config: dict[str, Any], **settings: Any) -> None:
        fields = {key: value for key, value in {**SIZES, **config}.items() if value is not ...}

        def base() -> Any:
            return tiny_model(name, attention="eager", **fields)

        base().save_pretrained(folder / "base")
        references = self.references(base, folder)
        self.requests: list[Request] = [
            (adapter, random_ids(length, seed=length + number).tolist())
            for number, adapter in enumerate(references)
            for length in self.prompt_lengths
        ]
        self.expected = [references[adapter](prompt) for adapter, prompt in self.requests]
        adapters = prefix_adapters({name: str(folder / name) for name in references if name is not None})
        fixed = {"num_gpu_blocks_override": 256, "max_model_len": CONTEXT, **adapters}
        with ExitStack() as stack:
            stack.enter_context(_unchanged(type(base().base_model)))
            self.llm = start(folder / "base", **{**fixed, **settings})
            self._classes = stack.pop_all()

    def references(self, base: Callable[[], Any], folder: Path) -> dict[str | None, Reference]:
        """Saves the prefixes in folders of their names, and returns the reference of each, and of the base model."""
        references: dict[str | None, Reference] = {None: partial(generate, base())}
        for length in LENGTHS:
            model = with_prefix(base(), seed=length, num_virtual_tokens=length)
            model.save_pretrained(folder / f"p{length}")
            references[f"p{length}"] = partial(generate, model)
        return references

    def outputs(self) -> list[Any]:
        """Returns vLLM's outputs of all requests, in one batch."""
        outputs: list[Any] = self.llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in self.requests],
            SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0),
            lora_request=[name and PrefixAdapterRequest(name) for name, _ in self.requests],
            use_tqdm=False,
        )
        return outputs

    def answers(self) -> list[Answer]:
        """Returns the tokens of every request and their log-probabilities."""
        return [_answer(output.outputs[0]) for output in self.outputs()]

    def check(self) -> None:
        """Compares every token and log-probability with `PeftModel.generate`."""
        answers = self.answers()
        for (adapter, prompt), (tokens, logprobs), (expected, theirs) in zip(
            self.requests, answers, self.expected, strict=True
        ):
            assert tokens == expected, (adapter, len(prompt))
            assert logprobs == pytest.approx(theirs, abs=self.tolerance), (adapter, len(prompt))

    def num_preemptions(self) -> int:
        """Returns how often a request was preempted so far."""
        return sum(int(metric.value) for metric in self.llm.get_metrics() if metric.name == "vllm:num_preemptions")

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        self._classes.close()


@contextmanager
def _unchanged(cls: type) -> Iterator[None]:
    """Restores a class of transformers: vLLM decorates some, which then cannot be instantiated outside of vLLM."""
    bases, own = cls.__bases__, dict(vars(cls))
    try:
        yield
    finally:
        cls.__bases__ = bases
        for name in vars(cls).keys() - own.keys():
            delattr(cls, name)
        for name, value in own.items():
            if vars(cls)[name] is not value:
                setattr(cls, name, value)


def forget_engine() -> None:
    """Destroys the process groups of an engine: those of a model without experts do not fit a model with experts."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    ensure_kv_transfer_shutdown()
    cleanup_dist_env_and_memory()


@torch.no_grad()
def generate(model: PeftModel, prompt: list[int]) -> Answer:
    """Returns the greedy tokens of `generate` and their log-probabilities."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, len(prompt) :].tolist()
    rows = zip(output.logits, tokens, strict=True)
    return tokens, [float(logits[0].log_softmax(-1)[token]) for logits, token in rows]


def _answer(output: Any) -> Answer:
    tokens = list(output.token_ids)
    return tokens, [row[token].logprob for row, token in zip(output.logprobs, tokens, strict=True)]
