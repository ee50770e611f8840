"""`DistillationTrainer` minimizes the mean divergence per token, in whatever parts a batch is computed."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from helpers.prefixed import prefix_kv, with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext.distillation.loss import forward_kl, reverse_kl
from peft_prefix_ext.distillation.targets import Target
from peft_prefix_ext.distillation.trainer import DistillationTrainer, TargetCollator
from peft_prefix_ext.generation.batching import answer_logits, pad_answers

K = 4


def targets():
    """Answers of very different lengths, so that a mean of means is another number."""
    found = []
    for number, (prompt, answer) in enumerate(((5, 2), (3, 19), (8, 1), (4, 7))):
        teacher = torch.randn(answer, 128, generator=torch.Generator().manual_seed(number)).log_softmax(dim=-1).topk(K)
        ids = random_ids(prompt, seed=number).tolist(), random_ids(answer, seed=9 + number).tolist()
        found.append(Target(number, [], None, *ids, teacher.indices.tolist(), teacher.values.tolist()))
    return found


def trainer(tmp_path, model, **arguments):
    options = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    return DistillationTrainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path),
            remove_unused_columns=False,
            prediction_loss_only=True,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            max_steps=1,
            **options,
            **arguments,
        ),
        train_dataset=targets(),
        eval_dataset=targets(),
        data_collator=TargetCollator(0),
    )


def mean_divergence(model, divergence=forward_kl):
    total, count = 0.0, 0
    for target in targets():
        logits = model(input_ids=torch.tensor([target.prompt_ids + target.answer_ids])).logits[0]
        start, end = len(target.prompt_ids) - 1, len(target.prompt_ids) + len(target.answer_ids) - 1
        total = (
            total + divergence(logits[start:end], torch.tensor(target.top_ids), torch.tensor(target.top_logprobs)).sum()
        )
        count += len(target.answer_ids)
    return total / count


@pytest.mark.parametrize(("size", "steps"), [(4, 1), (2, 2), (1, 4)])
def test_a_step_is_one_of_the_mean_per_token(tmp_path, size, steps):
    model = with_prefix(tiny_model("llama"))
    expected = mean_divergence(model)
    parameters = [each for each in model.parameters() if each.requires_grad]
    gradients = torch.autograd.grad(expected, parameters)
    before = [each.detach().clone() for each in parameters]
    run = trainer(tmp_path, model, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
    result = run.train()
    assert result.training_loss == pytest.approx(expected.item(), rel=1e-4)
    for old, gradient, parameter in zip(before, gradients, parameters, strict=True):
        torch.testing.assert_close(old - parameter.detach(), gradient, atol=1e-6, rtol=1e-3)


def test_held_out_answers_are_scored_without_a_change(tmp_path):
    model = with_prefix(tiny_model("llama"))
    before = {name: kv.clone() for name, kv in prefix_kv(model).items()}
    run = trainer(tmp_path, model, per_device_eval_batch_size=4)
    run.divergence = reverse_kl
    with torch.no_grad():
        assert run.evaluate()["eval_loss"] == pytest.approx(mean_divergence(model).item(), rel=1e-4)
    assert all(torch.equal(kv, before[name]) for name, kv in prefix_kv(model).items())


def test_columns_without_an_answer_are_left_out():
    """Otherwise a long prompt beside a short one costs as many logits as it has tokens."""
    model, answers = tiny_model("llama"), [[1, 2], [3, 4, 5]]
    prompts = [[7], random_ids(40).tolist()]
    batch = pad_answers(prompts, answers, 0)
    assert batch["predicting"].tolist() == [0, 1, 39, 40, 41]
    logits = answer_logits(model, batch)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[row, batch["labels"][row] != -100], alone, atol=1e-5, rtol=1e-4)


def test_logits_of_a_model_that_computes_all(monkeypatch):
    """A forward without `logits_to_keep`, as older models have, gives the same."""
    model = tiny_model("llama")
    prompts, answers = [[5, 6, 7], [8, 9]], [[1], [2, 3, 4]]
    batch = pad_answers(prompts, answers, 0)
    assert batch["labels"].tolist() == [[-100, 1, -100], [2, 3, 4]]
    assert batch["predicting"].tolist() == [1, 2, 3]
    kept = answer_logits(model, batch)
    own = type(model).forward

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        return own(self, input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", forward)
    torch.testing.assert_close(answer_logits(model, batch), kept)
    assert kept.shape == (2, 3, 128)
