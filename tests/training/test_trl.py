"""TRL's trainers, unmodified: `peft_config=PrefixExtConfig(...)`, or a model that already has its prefix."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from prefixed import perturb
from tiny import random_ids, tiny_model
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_prefix_ext import PrefixExtConfig


def words(length, seed):
    return " ".join(f"w{token}" for token in random_ids(length, seed=seed).tolist())


TEXTS = Dataset.from_list([{"text": words(5 + seed % 7, seed)} for seed in range(16)])
COMPLETIONS = Dataset.from_list(
    [{"prompt": words(4 + seed % 3, seed) + " ", "completion": words(5, 100)} for seed in range(16)]
)


@pytest.fixture
def tokenizer(word_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(word_tokenizer)
    tokenizer.eos_token = "w2"
    return tokenizer


def trainer_of(model, folder, tokenizer, rows=COMPLETIONS, peft_config=None, **options):
    settings = {"learning_rate": 0.1, "num_train_epochs": 3, "save_strategy": "epoch", "eval_strategy": "epoch"}
    arguments = SFTConfig(
        str(folder),
        per_device_train_batch_size=8,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="epoch",
        **{**settings, **options},
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def config(**options):
    return PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, **options)


def losses(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "wrapped model"])
@pytest.mark.parametrize("reparam", ["none", "mlp"])
def test_sft_learns_completions(wrapped, reparam, tokenizer, tmp_path):
    """With TRL's defaults: gradient checkpointing, and the loss of the completions alone."""
    model, peft_config = tiny_model("llama"), config(reparam=reparam)
    if wrapped:
        model, peft_config = get_peft_model(model, peft_config), None
    trainer = trainer_of(model, tmp_path, tokenizer, peft_config=peft_config)
    assert trainer.args.gradient_checkpointing
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("prefix_ext_" in name for name in trained)
    reloaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "checkpoint-6")
    ids = random_ids(1, 5)
    torch.testing.assert_close(reloaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("reparam", ["none", "mlp"])
def test_sft_resumes_and_loads_the_best(reparam, tokenizer, tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    whole = trainer_of(tiny_model("llama"), tmp_path, tokenizer, peft_config=config(reparam=reparam), **options)
    whole.train()
    resumed = trainer_of(tiny_model("llama"), tmp_path, tokenizer, peft_config=config(reparam=reparam), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-4)
    best = min(losses(whole, "eval_loss"))
    assert resumed.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_sft_packs_without_a_leak(name, tokenizer, tmp_path):
    """The loss over packed rows is the one over single rows: every text sees the prefix and no other text."""

    def evaluate(**options):
        trainer = trainer_of(
            tiny_model(name), tmp_path, tokenizer, TEXTS, config(init_std=1.0), max_length=64, **options
        )
        return trainer.evaluate()["eval_loss"]

    assert evaluate(packing=True) == pytest.approx(evaluate(), rel=1e-5)


def test_dpo_refers_to_the_base_model_or_to_the_prefix_as_it_was(tokenizer, tmp_path):
    rows = Dataset.from_list(
        [{"prompt": words(4, s) + " ", "chosen": words(5, 50 + s), "rejected": words(6, 90 + s)} for s in range(8)]
    )
    start = get_peft_model(tiny_model("llama"), config(init_std=1.0, num_frozen_tokens=2, reparam="mlp"))
    perturb(start)
    start.save_pretrained(tmp_path / "start")

    def train(model, **options):
        arguments = DPOConfig(
            str(tmp_path),
            per_device_train_batch_size=8,
            max_steps=3,
            learning_rate=0.1,
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
        )
        trainer = DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, **options)
        trainer.train()
        return losses(trainer)

    def trained():
        return PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "start", is_trainable=True)

    fresh = {"peft_config": config(init_std=1.0)}
    expected = train(tiny_model("llama"), ref_model=tiny_model("llama"), **fresh)
    assert train(tiny_model("llama"), **fresh) == pytest.approx(expected, rel=1e-4)
    losses_of_trained = train(trained())
    assert losses_of_trained[0] == pytest.approx(math.log(2), rel=1e-4)  # nothing differs from the reference yet
    assert losses_of_trained[-1] < losses_of_trained[0] - 0.1
