"""`VLLMGenerator`: answers and log-probabilities are those of `PeftModel`, from an engine in processes of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers.prefixed import with_prefix
from helpers.serving import support
from helpers.serving.support import WORDS, prompt_ids
from peft_prefix_ext.generation.vllm_generator import VLLMGenerator

PROMPTS = [prompt_ids(length, seed=length) for length in (5, 21, 30, 1)]
NEW = 12
CONTEXT = 256
# More than a block of 32 tokens, and less than one.
LENGTHS = {"teacher": 40, "student": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, whose first answer ends, and two prefixes."""
    folder = tmp_path_factory.mktemp("generator")
    base = support.write_model(folder / "base", support.llama_config(max_position_embeddings=CONTEXT), tokenizer=True)
    answer = greedy(AutoModelForCausalLM.from_pretrained(base), PROMPTS[0])
    tokenizer = AutoTokenizer.from_pretrained(base)
    # The tokenizer has another end, which comes first.
    tokenizer.eos_token = WORDS[answer[2]]
    tokenizer.save_pretrained(base)
    GenerationConfig(eos_token_id=[1, answer[5]]).save_pretrained(base)
    for name, length in LENGTHS.items():
        write_prefix(folder, name, seed=length, num_virtual_tokens=length)
    return folder


def engine_processes() -> set[psutil.Process]:
    """Returns vLLM's processes below this one, those of other tests' servers included."""
    return {each for each in psutil.Process().children(recursive=True) if "VLLM" in each.name()}


@pytest.fixture(scope="module")
def others() -> set[psutil.Process]:
    """The processes of engines that run already."""
    return engine_processes()


@pytest.fixture(scope="module")
def generator(folder: Path, others: set[psutil.Process]) -> Iterator[VLLMGenerator]:
    from vllm import envs

    prefixes = {name: folder / name for name in LENGTHS}
    # No prefix stays in memory, so each load reads the folder.
    with VLLMGenerator(
        folder / "base", prefixes=prefixes, prefix_adapter_device_memory=0, progress=False, block_size=32
    ) as generator:
        envs.disable_envs_cache()  # which would last for the tests that follow
        yield generator


def write_prefix(folder: Path, name: str, **config: Any) -> Path:
    with_prefix(AutoModelForCausalLM.from_pretrained(folder / "base"), **config).save_pretrained(str(folder / name))
    return folder / name


def reference(folder: Path, name: str | None) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    return base if name is None else PeftModel.from_pretrained(base, str(folder / name)).eval()


@torch.no_grad()
def greedy(model: Any, prompt: list[int], max_new_tokens: int = NEW) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0}
    return list(
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    )


def answers_of(folder: Path, name: str | None) -> list[list[int]]:
    model = reference(folder, name)
    return [greedy(model, prompt) for prompt in PROMPTS]


def test_answers_are_those_of_peft(generator: VLLMGenerator, folder: Path) -> None:
    expected = {name: answers_of(folder, name) for name in (None, *LENGTHS)}
    for first, other in ((None, "teacher"), (None, "student"), ("teacher", "student")):
        assert all(one != two for one, two in zip(expected[first], expected[other], strict=True))
    for _ in range(2):  # loaded, and from the engine's cache
        for name, answers in expected.items():
            assert generator.generate(PROMPTS, max_new_tokens=NEW, prefix=name) == answers
    assert generator.generate([], max_new_tokens=NEW) == []


def test_an_answer_ends_with_the_end_of_sequence_of_the_generation_config(
    generator: VLLMGenerator, folder: Path
) -> None:
    end = GenerationConfig.from_pretrained(folder / "base").eos_token_id[1]
    own = AutoTokenizer.from_pretrained(folder / "base").eos_token_id
    (answer,) = generator.generate(PROMPTS[:1], max_new_tokens=NEW)
    assert answer.index(end) == len(answer) - 1 == 5
    assert answer.index(own) == 2
    assert generator.generate(PROMPTS[:1], max_new_tokens=5) == [answer[:-1]]
    # In a longer batch, the others go on.
    assert {len(each) for each in generator.generate(PROMPTS, max_new_tokens=NEW)} >= {6, NEW}


def test_a_prefix_is_replaced_in_place(generator: VLLMGenerator, folder: Path) -> None:
    before = generator.generate(PROMPTS, max_new_tokens=NEW, prefix="student")
    for seed in (11, 12):  # into the same folder
        write_prefix(folder, "round", seed=seed)
        generator.add_prefix("round", folder / "round")
        expected = answers_of(folder, "round")
        assert generator.generate(PROMPTS, max_new_tokens=NEW, prefix="round") == expected != before
        before = expected
    generator.add_prefix("round", folder / "student")
    assert generator.generate(PROMPTS, max_new_tokens=NEW, prefix="round") == answers_of(folder, "student")


def test_sampled_answers_follow_their_seed(generator: VLLMGenerator) -> None:
    def sample(prompts: list[list[int]], seed: int) -> list[list[int]]:
        return generator.generate(prompts, max_new_tokens=NEW, prefix="student", temperature=1.0, seed=seed)

    first, again, other = (sample(PROMPTS, seed) for seed in (1, 1, 2))
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert len({tuple(answer) for answer in sample([PROMPTS[0]] * 4, seed=0)}) == 4


@pytest.mark.parametrize("name", [None, *LENGTHS])
def test_scores_are_log_probabilities_of_peft(name: str | None, generator: VLLMGenerator, folder: Path) -> None:
    room = CONTEXT - LENGTHS.get(name or "", 0) - len(PROMPTS[2])
    answers = [prompt_ids(length, seed=50 + length) for length in (4, 1, room, 0)]
    scores = generator.score(PROMPTS, answers, top_k=5, prefix=name)
    model = reference(folder, name)
    for prompt, answer, found in zip(PROMPTS, answers, scores, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
        assert [len(row) for row in found.ids] == [5] * len(answer)
        for mine, theirs in (
            (found.logprobs, logprobs.topk(5).values),
            (found.logprobs, logprobs.gather(-1, torch.tensor(found.ids, dtype=torch.long).reshape(-1, 5))),
            (found.answer, logprobs[torch.arange(len(answer)), answer]),
        ):
            torch.testing.assert_close(torch.tensor(mine).reshape(theirs.shape), theirs, atol=2e-3, rtol=0)


def test_scores_of_the_whole_vocabulary(generator: VLLMGenerator) -> None:
    (scores,) = generator.score([PROMPTS[0]], [[5, 6]], top_k=1_000, prefix="teacher")
    assert [sorted(row) for row in scores.ids] == [list(range(support.VOCAB_SIZE))] * 2
    assert torch.tensor(scores.logprobs).exp().sum(-1).tolist() == pytest.approx([1.0, 1.0])


def test_one_sentence_says_what_is_wrong(generator: VLLMGenerator, folder: Path) -> None:
    before = generator.generate(PROMPTS, max_new_tokens=NEW, prefix="student")
    long = [PROMPTS[0], prompt_ids(CONTEXT - LENGTHS["teacher"])]
    for call, message in (
        (
            lambda: generator.generate(PROMPTS, max_new_tokens=NEW, prefix="nobody"),
            "There is no prefix 'nobody'; load it",
        ),
        (lambda: generator.generate(long, max_new_tokens=NEW, prefix="teacher"), "shorten the prompt to at most 215"),
        (lambda: generator.generate([prompt_ids(CONTEXT + 1)], max_new_tokens=NEW), "maximum context length is 256"),
        (lambda: generator.score(long, [[5], [5]], top_k=2, prefix="teacher"), "shorten the prompt to at most 215"),
        (lambda: generator.generate([[5, support.VOCAB_SIZE]], max_new_tokens=NEW), "out of vocabulary"),
        (lambda: generator.score([[5]], [[support.VOCAB_SIZE]], top_k=2), "out-of-vocab"),
        (lambda: generator.generate(PROMPTS, max_new_tokens=0), "max_tokens must be at least 1"),
        (lambda: generator.generate(PROMPTS, max_new_tokens=1, temperature=-1), "temperature must be non-negative"),
        (lambda: generator.add_prefix("student", folder / "base"), "it is not a PEFT adapter"),
        (lambda: generator.add_prefix("a b", folder / "teacher"), "name must be up to 256 letters"),
    ):
        with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
            call()
        assert message in str(caught.value)
    # And the engine goes on, with what it had.
    assert generator.generate(PROMPTS, max_new_tokens=NEW, prefix="student") == before


def test_a_folder_that_changes_needs_loading_again(generator: VLLMGenerator, folder: Path) -> None:
    generator.add_prefix("changed", write_prefix(folder, "changed", seed=21))
    write_prefix(folder, "changed", seed=22)
    with pytest.raises(RuntimeError, match=r"\AThe prefix 'changed' is no longer in its folder[^\n]* `add_prefix`\.\Z"):
        generator.generate(PROMPTS, max_new_tokens=NEW, prefix="changed")
    generator.add_prefix("changed", folder / "changed")
    assert generator.generate(PROMPTS, max_new_tokens=NEW, prefix="changed") == answers_of(folder, "changed")


def test_progress_has_one_bar(generator: VLLMGenerator, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(generator, "progress", True)
    generator.generate(PROMPTS, max_new_tokens=2)
    generator.score(PROMPTS, PROMPTS, top_k=2)
    shown = capsys.readouterr().err
    assert "Answering: 100%" in shown
    assert "Scoring: 100%" in shown
    assert "prompts" not in shown


def test_close_leaves_no_process(generator: VLLMGenerator, folder: Path, others: set[psutil.Process]) -> None:
    # The last test of this file: training follows in the same process.
    engine = engine_processes() - others
    assert engine
    generator.close()
    generator.close()
    assert psutil.wait_procs(engine, timeout=5)[1] == []
    for call in (
        lambda: generator.generate(PROMPTS, max_new_tokens=1),
        lambda: generator.add_prefix("student", folder / "student"),
    ):
        with pytest.raises(RuntimeError, match=r"\AThis generator is closed; create another one\.\Z"):
            call()
