"""Several threads use one model, as in a web server: each gets the same output as without the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from helpers.prefixed import perturb, with_prefix
from helpers.tiny import random_ids, tiny_config, tiny_model
from peft_prefix_ext import PrefixExtConfig

NUM_THREADS, ROUNDS = 4, 3
LENGTHS = range(3, 27)


def assert_answers_alike(answer, jobs):
    """Runs the jobs one after the other, then several times in threads, and compares."""
    expected = [answer(job) for job in jobs]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for _ in range(ROUNDS):
            for job, ours, theirs in zip(jobs, pool.map(answer, jobs), expected, strict=True):
                assert torch.equal(ours, theirs), job


def generate(model, length, **options):
    ids = random_ids(options.pop("rows", 1), length, seed=length)
    mask = torch.ones_like(ids)
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("reparam", ["none", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "gemma3", "mpt"])
def test_one_prefix(name, reparam):
    model = with_prefix(tiny_model(name, attention="eager" if name in ("bloom", "mpt") else "sdpa"), reparam=reparam)
    perturb(model)
    assert_answers_alike(lambda length: generate(model, length), LENGTHS)


def test_a_loaded_prefix(tmp_path):
    with_prefix(tiny_model("llama")).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert_answers_alike(lambda length: generate(model, length), LENGTHS)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_each_thread_has_its_own_adapter_names(name):
    """Batches of several sizes with prefixes of several lengths, mixed with batches of the active adapter."""
    model = with_prefix(tiny_model(name, attention="eager"), reparam="mlp")
    for other, p in (("short", 3), ("long", 11)):
        model.add_adapter(other, PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=p, init_std=1.0))
    model.eval()
    names = ["long", "__base__", "default", "short"]

    def answer(length):
        rows = length % 4  # none: the active one alone
        if not rows:
            return generate(model, length)
        own = [names[(length + row) % 4] for row in range(rows)]
        return generate(model, length, rows=rows, adapter_names=own)

    assert_answers_alike(answer, LENGTHS)


@torch.no_grad()
def test_heads_of_each_row():
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=3)).eval()
    model = get_peft_model(base, PrefixExtConfig(task_type="SEQ_CLS", num_virtual_tokens=4, init_std=1.0))
    perturb(model)
    model.add_adapter("other", PrefixExtConfig(task_type="SEQ_CLS", num_virtual_tokens=6, init_std=1.0))
    model.set_adapter("other")
    perturb(model)
    model.eval()
    names = ["other", "__base__", "default"]

    def answer(length):
        own = [names[(length + row) % 3] for row in range(3)]
        with torch.no_grad():  # the gradient mode is per thread too
            return model(input_ids=random_ids(3, length, seed=length), adapter_names=own).logits

    assert_answers_alike(answer, LENGTHS)
