"""No request reads states, latents or pictures of another: random requests on a hybrid, MLA and a vision-language model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.prefixed import with_prefix
from helpers.serving import vision_configs
from helpers.serving.architectures import CONTEXT, SIZES, forget_engine, generate
from helpers.serving.chaos import Chaos, Content
from helpers.serving.cpu_defects import avoid_defects
from helpers.serving.engines import Pool, RunningEngine, start
from helpers.serving.served import EXACT, HYBRIDS
from helpers.serving.vision import ServedVision, model_inputs, with_pictures
from helpers.serving.vision import generate as generate_with_pictures
from helpers.serving.vision_models import processor, save, vision_model
from helpers.tiny import random_ids, tiny_model
from vllm_plugin import prefix_adapters

# Of each adapter's two contents; 32 fills a block.
LENGTHS = {"a": (7, 32), "b": (32, 45), "c": (45, 7)}
# Prompts share their beginnings, so real tokens share blocks as well, but only after the same prefix.
TEXTS = [random_ids(length, seed=length).tolist() for length in (1, 20, 40)] + [
    random_ids(64, seed=64).tolist() + random_ids(5, seed=seed).tolist() for seed in (1, 2)
]


@dataclass
class Kind:
    """One of these models.

    Args:
        base: Makes it.
        save: Saves it in a folder.
        prompts: Prompts in vLLM's form.
        answer: Returns the tokens of a model, with a prefix or without, for the prompt of a number.
        settings: Settings of the engine: too few blocks for all requests, and chunks.
        resets: Whether the prefix cache is reset while requests run.
    """

    base: Callable[[], Any]
    save: Callable[[Path], Any]
    prompts: list[dict[str, Any]]
    answer: Callable[[Any, int], list[int]]
    settings: dict[str, Any]
    resets: bool = True


def of_text(name: str, config: dict[str, Any], num_blocks: int) -> Kind:
    fields = {key: value for key, value in {**SIZES, **config}.items() if value is not ...}

    def base() -> Any:
        return tiny_model(name, attention="eager", **fields)

    return Kind(
        base,
        lambda folder: base().save_pretrained(folder),
        [{"type": "token", "prompt_token_ids": prompt} for prompt in TEXTS],
        lambda model, number: generate(model, TEXTS[number])[0],
        {"num_gpu_blocks_override": num_blocks, "max_model_len": CONTEXT},
    )


def of_pictures(name: str, num_blocks: int) -> Kind:
    prompts, reader = with_pictures(name), processor(name)
    return Kind(
        lambda: vision_model(name),
        lambda folder: save(name, folder),
        [ServedVision.engine_prompt(prompt) for prompt in prompts],
        lambda model, number: generate_with_pictures(model, model_inputs(reader, prompts[number]), 12)[0],
        {
            "num_gpu_blocks_override": num_blocks,
            "max_model_len": vision_configs.CONTEXT,
            "skip_tokenizer_init": False,
            "limit_mm_per_prompt": {"image": 2, "video": 0},
        },
        # vLLM 0.32 ends then, without any prefix: the images of running requests are no longer there.
        resets=False,
    )


KINDS: dict[str, Callable[[], Kind]] = {
    "lfm2": lambda: of_text("lfm2", HYBRIDS["lfm2"], 20),
    "deepseek_v3": lambda: of_text("deepseek_v3", EXACT["deepseek_v3"], 20),
    "qwen3_vl": lambda: of_pictures("qwen3_vl", 14),
}


@pytest.fixture
def kind(request: pytest.FixtureRequest, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kind]:
    pool.close()
    forget_engine()
    avoid_defects(monkeypatch)
    yield KINDS[request.param]()
    forget_engine()


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_every_answer_is_its_own(kind: Kind, tmp_path: Path) -> None:
    kind.save(tmp_path / "base")
    numbers = range(len(kind.prompts))
    contents: dict[str, list[Content]] = {}
    for name, lengths in LENGTHS.items():
        contents[name] = []
        for length in lengths:
            path = tmp_path / f"{name}{length}"
            model = with_prefix(kind.base(), seed=ord(name) + length, num_virtual_tokens=length)
            model.save_pretrained(path)
            contents[name].append(Content(path, [kind.answer(model, number) for number in numbers]))
    base = Content(None, [kind.answer(kind.base(), number) for number in numbers])
    every = [base, *(content for versions in contents.values() for content in versions)]
    assert len({tuple(map(tuple, content.answers)) for content in every}) == len(every)
    adapters = prefix_adapters({name: str(versions[0].path) for name, versions in contents.items()})
    llm = start(tmp_path / "base", max_num_batched_tokens=48, max_num_seqs=8, **kind.settings, **adapters)
    try:
        Chaos(RunningEngine(llm), kind.prompts, contents, base, random.Random(5), kind.resets).run(1000)
    finally:
        llm.llm_engine.engine_core.shutdown()
