"""Answers and log-probabilities of a model in this process, with prefixes by name."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model, tiny_tokenizer
from peft_prefix_ext.generation.transformers_generator import TransformersGenerator

PROMPTS = [random_ids(length, seed=length).tolist() for length in (3, 9, 1, 6)]
NEW = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two prefixes of the same model."""
    paths = []
    for seed in (1, 2):
        path = tmp_path_factory.mktemp(f"prefix{seed}")
        with_prefix(tiny_model("llama"), seed=seed).save_pretrained(str(path))
        paths.append(path)
    return paths


def generator(model=None, **options):
    return TransformersGenerator(
        model or tiny_model("llama"), tiny_tokenizer(), batch_size=3, progress=False, **options
    )


@torch.no_grad()
def alone(model, prompt, max_new_tokens=NEW):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[0, len(prompt) :].tolist()


def test_answers_in_batches_are_those_of_one_prompt_each(folders):
    model = generator()
    base = [alone(tiny_model("llama"), prompt) for prompt in PROMPTS]
    assert model.generate(PROMPTS, max_new_tokens=NEW) == base
    for path in folders:  # the second in place of the first
        model.add_prefix("one", path)
        expected = [alone(PeftModel.from_pretrained(tiny_model("llama"), str(path)), prompt) for prompt in PROMPTS]
        assert model.generate(PROMPTS, max_new_tokens=NEW, prefix="one") == expected != base
        assert model.generate(PROMPTS, max_new_tokens=NEW) == base


def test_the_model_is_left_as_it_was(folders):
    prefixed = with_prefix(tiny_model("llama")).train()
    own = generator(prefixed)
    own.add_prefix("teacher", folders[0])
    prefixed.generation_config.repetition_penalty = 1.5
    plain = generator()
    plain.add_prefix("teacher", folders[0])
    assert own.generate(PROMPTS, max_new_tokens=NEW, prefix="teacher") == plain.generate(
        PROMPTS, max_new_tokens=NEW, prefix="teacher"
    )
    own.score(PROMPTS, PROMPTS, top_k=2)
    assert prefixed.active_adapter == "default"
    assert prefixed.training
    assert prefixed.generation_config.repetition_penalty == 1.5
    assert [name for name, each in prefixed.named_parameters() if each.requires_grad]
    assert not any(each.requires_grad for name, each in prefixed.named_parameters() if "teacher" in name)


def test_an_answer_ends_with_the_end_of_sequence():
    model = tiny_model("llama")
    answers = [alone(model, prompt) for prompt in PROMPTS]
    end = answers[0][3]
    model.generation_config.eos_token_id = [end, 1]
    expected = [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]
    assert len(expected[0]) <= 4
    assert generator(model).generate(PROMPTS, max_new_tokens=NEW) == expected


def test_sampled_answers_follow_their_seed():
    state = torch.get_rng_state()
    first, again, other = (
        generator().generate(PROMPTS, max_new_tokens=NEW, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", [None, "one"])
def test_scores_are_log_probabilities_of_the_model(folders, name):
    model = generator()
    model.add_prefix("one", folders[0])
    answers = [random_ids(length, seed=50 + length).tolist() for length in (4, 2, 5, 3)]
    scores = model.score(PROMPTS, answers, top_k=5, prefix=name)
    alone = tiny_model("llama") if name is None else PeftModel.from_pretrained(tiny_model("llama"), str(folders[0]))
    for prompt, answer, found in zip(PROMPTS, answers, scores, strict=True):
        with torch.no_grad():
            logits = alone(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(dim=-1)
        expected = logprobs.topk(5)
        assert found.ids == expected.indices.tolist()
        torch.testing.assert_close(torch.tensor(found.logprobs), expected.values, atol=1e-5, rtol=0)
        own = logprobs[torch.arange(len(answer)), answer]
        torch.testing.assert_close(torch.tensor(found.answer), own, atol=1e-5, rtol=0)
