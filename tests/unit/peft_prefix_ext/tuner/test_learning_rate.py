"""A learning rate that is too low for a prefix is raised, with one warning."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Adafactor, AutoTokenizer, Trainer, TrainingArguments, get_linear_schedule_with_warmup
from trl import SFTConfig, SFTTrainer

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig

IDS = random_ids(2, 9)
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 3, "save_strategy": "no"}


@pytest.fixture(autouse=True)
def _free():
    """Other tests leave models behind that never trained."""
    gc.collect()


def told(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if "The learning rate of the prefix" in str(each.message)]


def step(model, optimizer, scheduler=None, times=2):
    for _ in range(times):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


LOW = (
    "The learning rate of the prefix is {}, at which it learns very little: it is raised to {}, the `min_learning_rate` of "
    "its config, which may be 0."
)


@pytest.mark.parametrize(
    ("reparam", "rate", "expected"),
    [
        ("mlp", 5e-5, [LOW.format("5e-05", "1e-3")]),
        ("none", 2e-4, [LOW.format("0.0002", "2e-2")]),
        ("mlp", 1e-3, []),
        ("none", 2e-2, []),
    ],
)
def test_a_low_rate_warns_once(reparam, rate, expected):
    model = with_prefix(tiny_model("llama"), reparam=reparam)
    optimizer = torch.optim.AdamW(trained(model), lr=rate)
    assert told(lambda: step(model, optimizer)) == expected


def after(model, optimizer, rates):
    """Returns the prefix after a step at each of the rates."""
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        step(model, optimizer, times=1)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adam, bitsandbytes.optim.PagedAdamW32bit])
@pytest.mark.parametrize(
    ("reparam", "given", "rates", "steps_at"),
    [
        ("none", None, [2e-5, 1e-5, 0.0], [2e-2, 1e-2, 0.0]),
        ("mlp", None, [5e-5, 5e-5], [1e-3, 1e-3]),
        ("mlp", 0.0, [5e-5, 5e-5], [5e-5, 5e-5]),
        ("none", 1e-3, [1e-4, 5e-5], [1e-3, 5e-4]),
        # A warm-up by hand never steps farther than the lowest rate, until it is above it.
        ("none", None, [1e-3, 1e-2, 4e-2, 2e-2], [2e-2, 2e-2, 4e-2, 2e-2]),
    ],
    ids=["decay", "mlp", "off", "own", "warm-up by hand"],
)
def test_steps_are_those_of_the_raised_rate(optimizer_class, reparam, given, rates, steps_at):
    def train(at, lowest):
        model = with_prefix(tiny_model("llama"), reparam=reparam, min_learning_rate=lowest)
        return after(model, optimizer_class(trained(model), lr=at[0]), at)

    raised, wanted = train(rates, given), train(steps_at, 0.0)
    for name, value in wanted.items():
        torch.testing.assert_close(raised[name], value, rtol=1e-5, atol=1e-6)


def test_other_parameters_of_a_group_keep_their_rate():
    """As for LoRA, or a head, that trains beside the prefix in one optimizer."""
    model = with_prefix(tiny_model("llama"), reparam="none")
    other = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([*trained(model), other], lr=1e-4, weight_decay=0.0)
    start = trained(model)[0].detach().clone()
    other.grad = torch.ones(3)
    group, state = optimizer.param_groups[0], optimizer.state
    step(model, optimizer, times=1)
    torch.testing.assert_close(other.detach(), torch.full((3,), 1 - 1e-4))
    assert (trained(model)[0] - start).abs().max().item() == pytest.approx(2e-2, rel=1e-2)
    assert optimizer.param_groups == [group]
    assert optimizer.state is state
    assert group["lr"] == 1e-4


def test_a_step_that_fails_leaves_the_optimizer_as_it_was():
    model = with_prefix(tiny_model("llama"), reparam="none")

    class Failing(torch.optim.AdamW):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    optimizer = Failing(trained(model), lr=1e-4)
    groups = optimizer.param_groups
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, optimizer, times=1)
    optimizer.fails = False
    step(model, optimizer)
    assert optimizer.param_groups is groups
    assert groups[0]["lr"] == 1e-4


def test_what_an_optimizer_keeps_in_its_groups_stays():
    model = with_prefix(tiny_model("llama"), reparam="none")

    class CountingAdam(torch.optim.AdamW):
        def step(self, closure=None):
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
            return super().step(closure)

    optimizer = CountingAdam(trained(model), lr=1e-4)
    step(model, optimizer, times=3)
    assert optimizer.param_groups[0]["count"] == 3


def test_a_saved_optimizer_goes_on_as_before():
    def model_and_optimizer():
        model = with_prefix(tiny_model("llama"), reparam="none")
        return model, torch.optim.AdamW(trained(model), lr=1e-4)

    model, optimizer = model_and_optimizer()
    step(model, optimizer, times=2)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    saved = copy.deepcopy(optimizer.state_dict())
    step(model, optimizer, times=2)
    resumed, other = model_and_optimizer()
    resumed.load_state_dict(weights)
    other.load_state_dict(saved)
    step(resumed, other, times=2)
    for left, right in zip(trained(model), trained(resumed), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(("arguments", "count"), [({}, 1), ({"learning_rate": 2e-3}, 0), ({"warmup_steps": 2}, 1)])
def test_the_default_of_the_trainer_warns(arguments, count, tmp_path):
    model = with_prefix(tiny_model("llama"), reparam="mlp")
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **QUIET, **arguments), train_dataset=ROWS)
    assert len(told(trainer.train)) == count


@pytest.mark.parametrize(("arguments", "count"), [({}, 1), ({"learning_rate": 2e-3, "warmup_steps": 2}, 0)])
def test_the_default_of_trl_warns(arguments, count, word_tokenizer, tmp_path):
    trainer = SFTTrainer(
        tiny_model("llama"),
        SFTConfig(str(tmp_path), bf16=False, **QUIET, **arguments),
        train_dataset=Dataset.from_list([{"text": "w5 w6 w7"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(word_tokenizer, eos_token="w2"),
        peft_config=PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    )
    assert len(told(trainer.train)) == count


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: get_linear_schedule_with_warmup(optimizer, 2, 4),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=9),
    ],
    ids=["warm-up", "one cycle"],
)
def test_a_warm_up_does_not_warn(schedule):
    model = with_prefix(tiny_model("llama"), reparam="mlp")
    optimizer = torch.optim.Adam(trained(model), lr=2e-3)
    scheduler = schedule(optimizer)
    assert optimizer.param_groups[0]["lr"] < 1e-4
    assert told(lambda: step(model, optimizer, scheduler)) == []


def test_a_saved_prefix_that_continues_training(tmp_path):
    with_prefix(tiny_model("llama"), reparam="mlp").save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert trained(frozen) == []
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert len(told(lambda: step(model, torch.optim.AdamW(trained(model), lr=2e-5)))) == 1


def test_other_models_and_optimizers_do_not_warn():
    model = with_prefix(tiny_model("llama"), reparam="mlp")
    other = torch.nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    assert told(torch.optim.AdamW(other.parameters(), lr=1e-6).step) == []
    assert told(lambda: step(model, torch.optim.SGD(trained(model), lr=1e-6))) == []
    model = with_prefix(tiny_model("llama"), reparam="mlp")
    assert told(lambda: step(model, Adafactor(trained(model)))) == []


def test_each_optimizer_of_a_model_is_raised():
    """A second training makes its own."""
    model = with_prefix(tiny_model("llama"), reparam="mlp")
    assert len(told(lambda: step(model, torch.optim.AdamW(trained(model), lr=2e-3)))) == 0
    for _ in range(2):
        assert len(told(lambda: step(model, torch.optim.AdamW(trained(model), lr=5e-5)))) == 1


def test_no_model_is_kept():
    model = with_prefix(tiny_model("llama"))
    reference = weakref.ref(model.get_base_model())
    step(model, torch.optim.AdamW(trained(model), lr=1e-4))
    del model
    gc.collect()
    assert reference() is None


def test_hooks_of_others_run_beside_ours():
    steps = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: steps.append(optimizer))
    try:
        for rate in (0.1, 1e-4):
            model = with_prefix(tiny_model("llama"))
            step(model, torch.optim.AdamW(trained(model), lr=rate))
            del model
            gc.collect()
        other = torch.nn.Linear(2, 2)
        other(torch.ones(2)).sum().backward()
        torch.optim.AdamW(other.parameters()).step()
    finally:
        handle.remove()
    assert len(steps) == 5
