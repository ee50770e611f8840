"""A compiled text of 500 tokens, served: every token is that of the base model with the text in its prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers.serving.architectures import Reference, Served, forget_engine, generate
from helpers.serving.cpu_defects import avoid_defects
from helpers.serving.engines import Pool
from helpers.serving.served import HYBRIDS
from helpers.serving.support import prompt_ids
from peft_prefix_ext.distillation.compile import compile_context
from peft_prefix_ext.distillation.context import Context

LENGTH, CONTEXT = 500, 640
# Full attention, windows shorter than the text, and recurrent layers.
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "gemma3": {}, "lfm2": HYBRIDS["lfm2"]}


class ServedTexts(Served):
    """A model with two compiled texts, whose references are `generate` of the base model with the text in the prompt."""

    prompt_lengths = (1, 40)

    def references(self, base: Callable[[], Any], folder: Path) -> dict[str | None, Reference]:
        def behind(text: list[int], prompt: list[int]) -> Any:
            return generate(base(), [*text, *prompt])

        references: dict[str | None, Reference] = {None: partial(generate, base())}
        for name, seed in (("one", 1), ("two", 2)):
            text = prompt_ids(LENGTH, seed=seed)
            compile_context(base(), Context(text), folder / name)
            references[name] = partial(behind, text)
        return references


@pytest.fixture
def serve(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ServedTexts]]:
    """Starts a separate engine, and stops the shared one."""
    pool.close()
    forget_engine()
    avoid_defects(monkeypatch)
    served: list[ServedTexts] = []

    def start(name: str) -> ServedTexts:
        fields = {"max_position_embeddings": CONTEXT, **MODELS[name]}
        served.append(ServedTexts(name, tmp_path, fields, max_model_len=CONTEXT))
        return served[0]

    yield start
    for one in served:
        one.close()
    forget_engine()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "lfm2" else pytest.mark.soak) for name in MODELS]
)
def test_same_tokens_as_behind_the_text(name: str, serve: Callable[[str], ServedTexts]) -> None:
    served = serve(name)
    assert len({tuple(tokens) for tokens, _ in served.expected}) == len(served.expected)
    served.check()
    served.check()  # from blocks that are there
