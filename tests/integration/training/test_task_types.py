"""PEFT's other task types on decoder models: sequence and token classification, question answering, features."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from helpers.prefixed import perturb
from helpers.tiny import random_ids, tiny_config
from peft_prefix_ext import PrefixExtConfig

TEXT = [1, 5, 17, 40, 23, 99]
HEADS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "score"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "score"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "qa_outputs"),
    "FEATURE_EXTRACTION": ("AutoModel", None),
    None: ("AutoModelForCausalLM", None),
}
IDS = random_ids(4, 12, seed=2)
LABELS = {
    "SEQ_CLS": {"labels": torch.tensor([0, 2, 1, 1])},
    "TOKEN_CLS": {"labels": random_ids(4, 12) % 3},
    "QUESTION_ANS": {"start_positions": torch.tensor([1, 4, 0, 2]), "end_positions": torch.tensor([5, 4, 9, 3])},
    None: {"labels": IDS},
}


def base_model(task_type, name="llama"):
    torch.manual_seed(0)
    config = tiny_config(name)
    if task_type != "QUESTION_ANS":
        config.num_labels = 3
    model = getattr(transformers, HEADS[task_type][0]).from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()


def prefixed(task_type, tokenizer, name="llama", **options):
    """A model whose prefix is `TEXT`."""
    words = " ".join(f"w{token}" for token in TEXT[1:])
    init = {"init": "text", "init_text": words, "tokenizer_name_or_path": tokenizer, "num_virtual_tokens": len(TEXT)}
    return get_peft_model(base_model(task_type, name), PrefixExtConfig(task_type=task_type, **init, **options)).eval()


def outputs(model, ids, **inputs):
    with torch.no_grad():
        return [
            out for out in model(input_ids=ids, use_cache=False, return_dict=False, **inputs) if out.is_floating_point()
        ]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("task_type", list(HEADS))
def test_a_prefix_of_text_answers_like_the_text(task_type, name, word_tokenizer):
    text = torch.tensor([TEXT]).expand(len(IDS), -1)
    expected = outputs(base_model(task_type, name), torch.cat([text, IDS], dim=1))
    for ours, theirs in zip(outputs(prefixed(task_type, word_tokenizer, name), IDS), expected, strict=True):
        kept = theirs if task_type == "SEQ_CLS" else theirs[:, len(TEXT) :]
        torch.testing.assert_close(ours, kept, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_class(side, word_tokenizer):
    model = prefixed("SEQ_CLS", word_tokenizer)
    (alone,) = outputs(model, IDS)
    padding = torch.zeros(4, 5, dtype=torch.long)
    ids = torch.cat([padding, IDS] if side == "left" else [IDS, padding], dim=1)
    (padded,) = outputs(model, ids, attention_mask=(ids != 0).long())
    torch.testing.assert_close(padded, alone, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("reparam", ["none", "mlp"])
@pytest.mark.parametrize("task_type", list(HEADS))
def test_a_trained_adapter_loads_with_its_head(task_type, reparam, word_tokenizer, tmp_path):
    model = prefixed(task_type, word_tokenizer, reparam=reparam)
    head = HEADS[task_type][1]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("prefix_ext_" in name for name in trained)
    assert {name for name in trained if "prefix_ext_" not in name} == {
        name for name in trained if head is not None and f".{head}.modules_to_save." in name
    }
    perturb(model)
    if task_type in LABELS:
        model.train()(input_ids=IDS, **LABELS[task_type]).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in trained), name
            # What is added to the logits of every position alike moves no answer: that bias has a gradient of rounding.
            moves_nothing = name.endswith("qa_outputs.modules_to_save.default.bias")
            assert parameter.grad is None or moves_nothing or parameter.grad.abs().max() > 0, name
    model.eval().save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(base_model(task_type), tmp_path)
    for ours, theirs in zip(outputs(back, IDS), outputs(model, IDS), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_classifier_trains_with_the_trainer_and_loads_by_itself(word_tokenizer, tmp_path):
    base_model("SEQ_CLS").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = PrefixExtConfig(task_type="SEQ_CLS", num_virtual_tokens=6)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(IDS, LABELS["SEQ_CLS"]["labels"], strict=True)]
    arguments = TrainingArguments(
        str(tmp_path / "runs"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=0.02,
        max_steps=12,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=True,
    )
    trainer = Trainer(get_peft_model(base, config), arguments, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    for ours, theirs in zip(outputs(loaded, IDS), outputs(trainer.model.eval(), IDS), strict=True):
        torch.testing.assert_close(ours, theirs)
