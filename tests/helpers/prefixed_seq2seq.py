"""Encoder-decoder models with a prefix, for tests."""

from __future__ import annotations

import torch

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids
from peft_prefix_ext.injection.layer import PrefixExtLayer

EVERYWHERE = {"encoder_prefix": True, "cross_prefix": True}
READ, WRITTEN, VIRTUAL = random_ids(2, 11), random_ids(2, 6, seed=3), [1, *random_ids(6, seed=5).tolist()]


def prefixed(model, **config):
    return with_prefix(model, task_type="SEQ_2_SEQ_LM", **config)


def layers_by_name(model):
    return {module.module_name: module for module in model.modules() if isinstance(module, PrefixExtLayer)}


def logits(model, written=WRITTEN, read=READ, **inputs):
    with torch.no_grad():
        return model(input_ids=read, decoder_input_ids=written, **inputs).logits


def greedy(model, read=READ, mask=None, **options):
    mask = torch.ones_like(read) if mask is None else mask
    options = {"max_new_tokens": 9, "do_sample": False, **options}
    return model.generate(input_ids=read, attention_mask=mask, **options)
