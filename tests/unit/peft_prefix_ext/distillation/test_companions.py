"""A student with companions in its cache is the adapter that `compose` makes of them."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext.conversion.compose import compose
from peft_prefix_ext.distillation.companions import Companions
from peft_prefix_ext.generation.batching import answer_logits, pad_answers


@pytest.fixture
def folders(tmp_path):
    paths = []
    for seed, length in ((1, 7), (2, 4), (3, 5)):
        model = with_prefix(tiny_model("llama"), seed=seed, num_virtual_tokens=length)
        paths.append(tmp_path / f"prefix{seed}")
        model.save_pretrained(str(paths[-1]))
    return paths


def batch():
    prompts, answers = (
        [random_ids(length, seed=length).tolist() for length in lengths] for lengths in ((4, 9), (6, 3))
    )
    return pad_answers(prompts, answers, pad_token_id=0)


def test_a_student_beside_companions_is_composed_with_them(folders, tmp_path):
    base = tiny_model("llama")
    companions = Companions(folders[1:], base, share=1.0)
    student = PeftModel.from_pretrained(base, str(folders[0])).eval()
    rows = batch()
    with torch.no_grad():
        alone = answer_logits(student, rows)
        beside = [answer_logits(student, rows, companions.draw(2)) for _ in range(8)]
    chosen = [folders[1:2], folders[2:], folders[1:], folders[:0:-1]]
    expected = []
    for number, others in enumerate(chosen):
        composed = compose([folders[0], *others], tmp_path / f"composed{number}")
        with torch.no_grad():
            expected.append(
                answer_logits(PeftModel.from_pretrained(tiny_model("llama"), str(composed.path)).eval(), rows)
            )
    is_real = rows["labels"] != -100
    nearest = [min((found - one)[is_real].abs().max().item() for one in expected) for found in beside]
    assert max(nearest) < 1e-5
    assert min((found - alone)[is_real].abs().max().item() for found in beside) > 1e-2
    assert len({min(range(4), key=lambda i: (found - expected[i])[is_real].abs().max().item()) for found in beside}) > 1


def test_gradients_reach_the_student_alone(folders):
    base = tiny_model("llama")
    companions = Companions(folders[1:], base, share=1.0)
    student = PeftModel.from_pretrained(base, str(folders[0]), is_trainable=True)
    answer_logits(student, batch(), companions.draw(2)).sum().backward()
    assert all(each.grad is not None for each in student.parameters() if each.requires_grad)


def test_the_share_of_batches_with_companions(folders):
    companions = Companions(folders[1:], tiny_model("llama"), share=0.25, seed=1)
    drawn = [companions.draw(1) is not None for _ in range(400)]
    assert 70 < sum(drawn) < 130
    assert Companions(folders[1:], tiny_model("llama"), share=0.0).draw(1) is None


def test_companions_of_another_model_are_refused(folders):
    with pytest.raises(ValueError, match="was trained on another base model"):
        Companions(folders, tiny_model("llama", num_hidden_layers=1))
