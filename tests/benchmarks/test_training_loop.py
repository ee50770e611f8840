"""Batches and the loss of answers, which all methods share."""

from itertools import chain

import torch

from benchmarks.quality.training_loop import Encoded, answer_loss, batches
from helpers.tiny import tiny_model

ROWS = [Encoded(list(range(2, 4 + n % 5)), list(range(10, 13 + n % 3))) for n in range(40)]


def test_batches_use_each_row_once_per_epoch_in_an_order_of_the_seed():
    first = list(batches(ROWS, size=4, steps=20, seed=0))
    assert list(batches(ROWS, size=4, steps=20, seed=0)) == first
    assert list(batches(ROWS, size=4, steps=20, seed=1)) != first
    used = list(map(id, chain.from_iterable(batches(ROWS, size=5, steps=8, seed=0))))
    assert sorted(used) == sorted(map(id, ROWS))


def test_answer_loss_is_that_of_the_answers_alone():
    model = tiny_model("llama")
    rows = [Encoded([3, 4, 5], [6, 7]), Encoded([8], [9, 10, 11, 12])]
    expected = []
    for row in rows:
        logits = model(torch.tensor([row.prompt + row.answer])).logits[0]
        expected.append(logits[len(row.prompt) - 1 : -1].log_softmax(-1)[range(len(row.answer)), row.answer])
    torch.testing.assert_close(answer_loss(model, rows, pad=0), -torch.cat(expected).mean())
