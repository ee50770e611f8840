"""Distillation from end to end on a tiny model: stages, what they leave in the work folder, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from helpers.chats import CHATML, tokenizer_with
from helpers.tiny import tiny_model
from peft_prefix_ext.checkpoint import read_prefix
from peft_prefix_ext.distillation.context import chat_context
from peft_prefix_ext.distillation.distill import Distillation
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.settings import DistillationSettings

SYSTEM = [{"role": "system", "content": "Aromi serves Italian food near the river. " * 4}]
QUESTIONS = [Question([{"role": "user", "content": f"Question {number}?"}]) for number in range(12)]
SETTINGS = DistillationSettings(
    num_virtual_tokens=8, num_held_out=3, max_new_tokens=6, top_k=5, num_epochs=2, num_questions=6
)
ARGUMENTS = {"use_cpu": True, "disable_tqdm": True}


@pytest.fixture
def tokenizer():
    return tokenizer_with(CHATML)


@pytest.fixture
def distillation(tokenizer, tmp_path):
    def make(settings=SETTINGS, **options):
        model = tiny_model("llama", vocab_size=len(tokenizer))
        context = chat_context(tokenizer, SYSTEM, "handbook.txt")
        options = {"questions": QUESTIONS, "work": tmp_path / "work", "arguments": ARGUMENTS, **options}
        return Distillation(model, tokenizer, context, settings, **options)

    return make


def test_from_a_context_to_an_adapter(distillation, tmp_path):
    run = distillation()
    out = run.save(tmp_path / "out")
    prefix = read_prefix(out)
    assert prefix.num_virtual_tokens == 8
    assert prefix.config["context"]["sources"].keys() == {"handbook.txt"}
    assert prefix.chat_template == run.context.chat_template
    # It was trained: the divergence of the student is less than that of where it started.
    training, held_out = run.make_targets()
    assert len(training) + len(held_out) <= 12
    assert {target.number for target in training}.isdisjoint(target.number for target in held_out)
    assert run.folder.seconds().keys() == {"compile", "targets", "train"}
    # The base model is as it was.
    assert not any("prefix" in name for name, _ in run.model.named_modules())
    loaded = PeftModel.from_pretrained(run.model, str(out))
    with torch.no_grad():
        loaded(input_ids=torch.tensor([training[0].prompt_ids]))
