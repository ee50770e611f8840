"""Divergences from a teacher of whom k tokens are known."""

from __future__ import annotations

import pytest
import torch

from peft_prefix_ext.distillation.loss import forward_kl, reverse_kl

VOCABULARY, N = 11, 6


def distributions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (2 * torch.randn(N, VOCABULARY, generator=generator, dtype=torch.double) for _ in range(2))
    return teacher.log_softmax(dim=-1), student


def known(teacher, k):
    top = teacher.topk(k)
    return top.indices, top.values


def whole(p, q):
    return (p.exp() * (p - q)).sum(dim=-1)


def test_all_but_one_token_is_the_whole_divergence():
    teacher, student = distributions()
    ids, logprobs = known(teacher, VOCABULARY - 1)
    own = student.log_softmax(dim=-1)
    torch.testing.assert_close(
        forward_kl(student, ids, logprobs), whole(teacher, own), atol=1e-4, rtol=1e-4, check_dtype=False
    )
    torch.testing.assert_close(
        reverse_kl(student, ids, logprobs), whole(own, teacher), atol=1e-4, rtol=1e-4, check_dtype=False
    )


@pytest.mark.parametrize("k", [1, 3, 7])
def test_groups_never_diverge_more_than_the_whole(k):
    teacher, student = distributions(k)
    ids, logprobs = known(teacher, k)
    for divergence, bound in (
        (forward_kl, whole(teacher, student.log_softmax(dim=-1))),
        (reverse_kl, whole(student.log_softmax(dim=-1), teacher)),
    ):
        found = divergence(student, ids, logprobs)
        assert found.shape == (N,)
        assert (found > 0).all()
        assert (found <= bound + 1e-5).all()
        assert divergence(teacher, ids, logprobs).abs().max() < 1e-5


def test_the_rest_has_a_gradient_of_its_own():
    """Without it, a student could move all that the teacher gives to other tokens to one of them."""
    teacher, student = distributions()
    ids, logprobs = known(teacher, 2)
    student.requires_grad_()
    forward_kl(student, ids, logprobs).sum().backward()
    others = torch.ones(N, VOCABULARY, dtype=torch.bool).scatter(1, ids, False)
    assert student.grad[others].abs().min() > 0


def test_a_teacher_that_is_sure_makes_no_infinite_loss():
    logits = torch.full((1, VOCABULARY), -1e4)
    logits[0, 3] = 0
    student = torch.zeros(1, VOCABULARY, requires_grad=True)
    ids, logprobs = known(logits.log_softmax(dim=-1), 4)
    for divergence in (forward_kl, reverse_kl):
        loss = divergence(student, ids, logprobs.clamp(min=-1e4)).sum()
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()
