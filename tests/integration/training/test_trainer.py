"""The unmodified `Trainer` of transformers: it learns, saves checkpoints, resumes, and loads the best one."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model

ROWS = [{"input_ids": row, "labels": row} for row in random_ids(16, 12, seed=4)]


def train(model, folder, resume=False, **arguments):
    arguments = {"num_train_epochs": 4, "learning_rate": 0.03, "save_strategy": "epoch", **arguments}
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        logging_strategy="epoch",
        disable_tqdm=True,
        seed=3,
        **arguments,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=ROWS, eval_dataset=ROWS[:8])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def prefix_state(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "prefix_ext_" in name}


@pytest.mark.parametrize("reparam", ["none", "mlp"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_learns_under_any_checkpointing(reparam, checkpointing, tmp_path):
    model = with_prefix(tiny_model("llama"), init_std=0.02, reparam=reparam)
    options = {}
    if checkpointing is not None:
        options = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing},
        }
    trainer = train(model, tmp_path, learning_rate=0.2, **options)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    "form",
    [{}, {"reparam_residual": False, "reparam_joint_kv": False, "prefix_dropout": 0.1, "layers_to_train": [0, 2]}],
)
def test_resume_equals_an_uninterrupted_run(form, tmp_path):
    config = {"init": "vocab", "reparam": "mlp", "reparam_dropout": 0.1, "num_frozen_tokens": 1, **form}
    whole = with_prefix(tiny_model("llama"), **config)
    train(whole, tmp_path / "whole")
    resumed = with_prefix(tiny_model("llama"), seed=8, **config)
    train(resumed, tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-4"))
    ours, theirs = prefix_state(whole), prefix_state(resumed)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], msg=key)


def test_lora_and_a_prefix_on_it_resume_together(tmp_path):
    def both(seed):
        torch.manual_seed(seed)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
        return with_prefix(get_peft_model(tiny_model("llama"), lora, adapter_name="tone"), seed, "task", reparam="mlp")

    whole, resumed = both(0), both(1)
    train(whole, tmp_path)
    train(resumed, tmp_path, resume=str(tmp_path / "checkpoint-4"))
    ours, theirs = whole.state_dict(), resumed.state_dict()
    for key in (key for key in ours if "lora_" in key or "prefix_ext_" in key):
        torch.testing.assert_close(theirs[key], ours[key], msg=key)


def test_best_model_is_loaded_at_the_end(tmp_path):
    model = with_prefix(tiny_model("llama"), init_std=0.02, reparam="mlp")
    trainer = train(
        model,
        tmp_path,
        eval_strategy="epoch",
        load_best_model_at_end=True,
        learning_rate=0.5,
        metric_for_best_model="loss",
    )
    evaluations = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = min(evaluations, key=evaluations.get)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[best], rel=1e-5)
    reloaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / f"checkpoint-{best}")
    ids = random_ids(1, 5)
    assert torch.equal(reloaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
