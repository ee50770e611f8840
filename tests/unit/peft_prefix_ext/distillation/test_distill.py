"""Distillation from end to end on a tiny model: stages, what they leave in the work folder, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from helpers.chats import CHATML, tokenizer_with
from helpers.tiny import tiny_model
from peft_prefix_ext.checkpoint import read_prefix
from peft_prefix_ext.distillation import student, teacher
from peft_prefix_ext.distillation.context import chat_context, text_context
from peft_prefix_ext.distillation.distill import Distillation
from peft_prefix_ext.distillation.loss import forward_kl
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.settings import DistillationSettings
from peft_prefix_ext.distillation.student import make_student
from peft_prefix_ext.distillation.targets import read_targets
from peft_prefix_ext.distillation.trainer import TargetCollator
from peft_prefix_ext.generation.batching import answer_logits
from peft_prefix_ext.generation.transformers_generator import TransformersGenerator

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
        context = chat_context(tokenizer, SYSTEM, {"handbook.txt": SYSTEM[0]["content"]})
        options = {"questions": QUESTIONS, "work": tmp_path / "work", "arguments": ARGUMENTS, **options}
        return Distillation(model, tokenizer, context, settings, **options)

    return make


def weights(folder):
    return {(index, kind): tensor for index, kind, tensor in read_prefix(folder).tensors()}


def test_from_a_context_to_an_adapter(distillation, tmp_path):
    run = distillation()
    out = run.save(tmp_path / "out")
    prefix = read_prefix(out)
    assert prefix.num_virtual_tokens == 8
    assert prefix.config["context"]["sources"].keys() == {"handbook.txt"}
    assert prefix.chat_template == run.context.chat_template
    training, held_out = run.make_targets()
    assert len(held_out) == 3
    assert {target.number for target in training}.isdisjoint(target.number for target in held_out)
    (trained,) = run.train().values()
    assert run.folder.seconds().keys() == {"compile", "targets", f"train {trained.name}"}
    # The base model is as it was.
    assert not any("prefix" in name for name, _ in run.model.named_modules())
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    # Nearer to the teacher than at its start, on questions that it was not trained on.
    def divergence(model):
        batch = TargetCollator(0)(held_out)
        is_answer = batch["labels"] != -100
        with torch.no_grad():
            logits = answer_logits(model.eval(), batch)[is_answer]
        return forward_kl(logits, batch["target_ids"][is_answer], batch["target_logprobs"][is_answer]).mean().item()

    trained = divergence(PeftModel.from_pretrained(run.model, str(out)))
    start = divergence(make_student(distillation(work=tmp_path / "other").model, run.context, SETTINGS, 0))
    assert trained < 0.9 * start


def test_a_run_that_was_killed_goes_on(distillation, tmp_path, monkeypatch):
    whole = distillation(work=tmp_path / "whole").save(tmp_path / "whole-out")
    # After two parts of the answers, and within the training.
    monkeypatch.setattr(teacher, "PART", 5)
    count = iter(range(100))
    append = teacher.append_targets

    def killed_later(path, targets):
        if next(count) == 2:
            raise KeyboardInterrupt
        append(path, targets)

    monkeypatch.setattr(teacher, "append_targets", killed_later)
    with pytest.raises(KeyboardInterrupt):
        distillation().save(tmp_path / "out")
    assert len(read_targets(tmp_path / "work" / "targets.jsonl")) == 10
    monkeypatch.setattr(teacher, "append_targets", append)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    original = student.DistillationTrainer.__init__

    def with_callback(self, *args, callbacks, **kwargs):
        original(self, *args, callbacks=[*callbacks, Kill()], **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(student.DistillationTrainer, "__init__", with_callback)
        with pytest.raises(KeyboardInterrupt):
            distillation().save(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    out = distillation().save(tmp_path / "out")
    expected = weights(whole)
    for key, tensor in weights(out).items():  # parts are padded to other lengths, and round otherwise
        torch.testing.assert_close(tensor, expected[key], atol=1e-4, rtol=1e-4)


def test_nothing_is_made_twice(distillation, tmp_path, monkeypatch):
    run = distillation()
    folders = run.train()
    for name in ("generate", "score"):
        monkeypatch.setattr(TransformersGenerator, name, None)
    monkeypatch.setattr(student.DistillationTrainer, "train", None)
    assert distillation().train() == folders


def test_other_settings_of_training_use_the_same_answers(distillation, tmp_path, monkeypatch):
    distillation().make_targets()
    monkeypatch.setattr(TransformersGenerator, "generate", None)
    other = distillation(replace(SETTINGS, num_virtual_tokens=4, seeds=2, reparam="none", token_dropout=0.2))
    folders = other.train()
    assert sorted(folders) == [0, 1]
    assert {read_prefix(folder).num_virtual_tokens for folder in folders.values()} == {4}
    best = [other.folder.result(folder)["divergence"] for folder in folders.values()]
    assert best == sorted(best)
    with pytest.raises(ValueError, match=r"made from other inputs \(max_new_tokens\)"):
        distillation(replace(SETTINGS, max_new_tokens=7))


def test_rounds_on_the_answers_of_the_student(distillation, tmp_path):
    run = distillation(replace(SETTINGS, on_policy_rounds=1))
    stored = next(iter(distillation(work=tmp_path / "stored").train().values()))
    folder = next(iter(run.train().values()))
    assert not any(
        torch.equal(one, two) for one, two in zip(weights(folder).values(), weights(stored).values(), strict=True)
    )
    assert not list(folder.glob("checkpoints*"))


def test_the_model_writes_the_questions(distillation):
    run = distillation(questions=None, settings=replace(SETTINGS, num_questions=4))
    training, held_out = run.make_targets()
    questions = run.folder.questions()
    assert 3 <= len({question.messages[0]["content"] for question in questions}) == len(questions) <= 4
    assert {each.number for each in training + held_out} <= set(range(len(questions)))
    assert all(each.messages == questions[each.number].messages for each in training + held_out)


def test_what_cannot_be_distilled_is_refused(distillation, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no more than the 500 virtual tokens that are to stand"):
        distillation(replace(SETTINGS, num_virtual_tokens=500))
    run = distillation(questions=[*QUESTIONS[:2], *QUESTIONS[:2]])  # the same question counts once
    with pytest.raises(ValueError, match="Only 2 questions have answers that depend on the context"):
        run.save(tmp_path / "out")
    run.context = text_context(tokenizer, ["Aromi"])
    with pytest.raises(ValueError, match="must be the opening of a chat"):
        replace(run, work=tmp_path / "text")
    tokenizer.chat_template = "{{ raise_exception('no x') if messages[-1].content == 'x' }}" + CHATML
    with pytest.raises(ValueError, match="does not take the message 'x'"):
        distillation(work=tmp_path / "other", questions=[Question([{"role": "user", "content": "x"}])])
    tokenizer.chat_template = CHATML
    # A model that says the same whatever it reads.
    deaf = distillation(work=tmp_path / "deaf")
    deaf.model.lm_head.weight.data.zero_()
    with pytest.raises(ValueError, match="answers all 12 questions the same with and without the context"):
        deaf.make_targets()
    assert not (tmp_path / "out").exists()


def test_a_model_in_the_place_of_the_adapter(distillation, tmp_path):
    run = distillation()
    run.model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a model: name another folder"):
        run.save(tmp_path / "model")
    assert not run.folder.targets.exists()
