"""Batches: the loss over the logits that are kept equals the usual loss over all of them."""

from types import SimpleNamespace

import torch
from torch.nn.functional import cross_entropy
from train import IGNORED, Collator, answer_loss

BATCH = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, IGNORED, IGNORED, 8, 9]},
    {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, IGNORED, 7, 8]},
    {"input_ids": [5, 6, 7], "labels": [IGNORED, IGNORED, 7]},
]


def test_collator_pads_on_the_right_and_masks_the_padding():
    batch = Collator(pad_token_id=2)(BATCH)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 8, 2], [5, 6, 7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]


def test_collator_keeps_the_logits_that_predict_an_answer():
    batch = Collator(pad_token_id=2)(BATCH)
    assert batch["logits_to_keep"].tolist() == [1, 2, 3]
    assert batch["labels"].tolist() == [[IGNORED, 8, 9], [7, 8, IGNORED], [7, IGNORED, IGNORED]]


def test_loss_equals_the_loss_over_all_logits():
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([item["labels"] + [IGNORED] * (5 - len(item["labels"])) for item in BATCH])
    full = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)

    batch = Collator(pad_token_id=2)(BATCH)
    kept = SimpleNamespace(logits=logits[:, batch["logits_to_keep"]])
    torch.testing.assert_close(answer_loss(kept, batch["labels"]), full)
