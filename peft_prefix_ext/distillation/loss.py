"""The divergence of a student from a teacher of whom only the most probable tokens are known.

The k tokens keep their probabilities, and all others share what is left: one more token, which stands for the rest. The
divergence of such groups never exceeds that of the whole distributions, and is zero if those are equal.

Shapes: n positions, k tokens.
"""

from __future__ import annotations

import torch

# The least probability of the rest: in float32 a sum of k probabilities may come out as one or more.
SMALLEST = 1e-6


def forward_kl(logits: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Returns KL(teacher || student) at each position, `[n]`: the student is to cover all that the teacher may say.

    Args:
        logits: The student's logits, `[n, vocab_size]`.
        ids: The teacher's most probable tokens, `[n, k]`.
        logprobs: Their log-probabilities, `[n, k]`.
    """
    teacher, student = _with_rest(logprobs), _with_rest(_logprobs_of(logits, ids))
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def reverse_kl(logits: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Returns KL(student || teacher) at each position, `[n]`: the student is to say nothing that the teacher would not.

    For answers of the student's own (on-policy distillation, arXiv 2306.13649 and 2602.12275). The arguments are those of
    `forward_kl`.
    """
    teacher, student = _with_rest(logprobs), _with_rest(_logprobs_of(logits, ids))
    return (student.exp() * (student - teacher)).sum(dim=-1)


def _logprobs_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    # Not `log_softmax`, which makes another tensor of the size of the vocabulary.
    return logits.gather(-1, ids) - logits.logsumexp(dim=-1, keepdim=True)


def _with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities of k tokens and of the rest, `[n, k + 1]`."""
    rest = (1 - logprobs.exp().sum(dim=-1, keepdim=True)).clamp(min=SMALLEST).log()
    return torch.cat([logprobs, rest], dim=-1)
