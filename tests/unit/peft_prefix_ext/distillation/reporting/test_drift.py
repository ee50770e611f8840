"""Drift is zero for what changes nothing, and large for what changes much."""

from __future__ import annotations

import pytest

from helpers.chats import DEFAULT_SYSTEM
from helpers.distillation import chat_generator, chat_model, chatml_tokenizer
from peft_prefix_ext.distillation.compile import compile_context
from peft_prefix_ext.distillation.context import chat_context
from peft_prefix_ext.distillation.reporting.drift import PROMPTS, answer_off_topic, measure_drift
from peft_prefix_ext.generation.prompts import prompt_ids


def test_drift(tmp_path):
    tokenizer = chatml_tokenizer()
    generator = chat_generator(tokenizer)
    off_topic = answer_off_topic(generator, tokenizer)
    assert len(off_topic.answers) == len(set(PROMPTS)) == len(PROMPTS) == 16
    found = {}
    for name, text in (("default", DEFAULT_SYSTEM), ("other", "Aromi serves Italian food.")):
        context = chat_context(tokenizer, [{"role": "system", "content": text}])
        compile_context(chat_model(tokenizer), context, tmp_path / name)
        generator.add_prefix(name, tmp_path / name)
        found[name] = measure_drift(generator, tokenizer, off_topic, name, context.chat_template)
    # The template writes this one by itself.
    assert found["default"].logprob_difference < 1e-4
    assert found["default"].same_token == 1.0
    assert found["other"].logprob_difference > 0.1
    assert found["other"].same_token < 0.9
    # By hand, on one prompt.
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": PROMPTS[3]}])
    (score,) = generator.score([prompt], [off_topic.answers[3]], top_k=1)
    assert score.answer == pytest.approx(off_topic.logprobs[3], abs=1e-4)
    assert [best[0] for best in score.ids] == off_topic.answers[3]
