"""The unmodified trainers of TRL, with `peft_config=PrefixExtConfig(...)` or a model that already has a prefix."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from helpers.prefixed import perturb
from helpers.tiny import VOCABULARY, random_ids, tiny_config, tiny_model
from helpers.tiny_processor import save_vision_model
from peft_prefix_ext import PrefixCheckpointError, PrefixExtConfig, read_prefix


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


def test_sft_with_pictures(tmp_path):
    """With rows that have a column of images, and the defaults of `SFTTrainer` for them."""
    save_vision_model(tmp_path / "base")
    colours = ("red", "blue")

    def rows(first):
        return Dataset.from_list(
            [
                {
                    "images": [Image.new("RGB", (16, 16), colours[(first + number) % 2])],
                    "prompt": [{"role": "user", "content": "colour"}],
                    "completion": [{"role": "assistant", "content": colours[number % 2]}],
                }
                for number in range(16)
            ]
        )

    options = {"max_length": None, "learning_rate": 0.02}
    trainer = trainer_of(str(tmp_path / "base"), tmp_path, None, rows(0), config(), **options)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 1
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("prefix_ext_" in name for name in trained)
    loss, swapped = (trainer.evaluate(rows(first))["eval_loss"] for first in (0, 1))
    assert swapped != pytest.approx(loss, rel=1e-3)  # the pictures are read
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    reloaded = PeftModel.from_pretrained(base, tmp_path / "checkpoint-6").eval()
    batch = next(iter(trainer.get_eval_dataloader()))
    torch.testing.assert_close(reloaded(**batch).logits, trainer.model.eval()(**batch).logits)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tokens_of_a_chat_template(tied, tokenizer, tmp_path):
    """TRL adds them to the model, and asks the config to train their embeddings and the head, tied or not."""
    template_of(tokenizer, tmp_path / "source")
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": words(5, seed)}]} for seed in range(8)])
    options = {"chat_template_path": str(tmp_path / "source"), "num_train_epochs": 1}
    bases = [tiny_model("llama", tie_word_embeddings=tied) for _ in range(2)]
    trainer = trainer_of(bases[0], tmp_path / "run", tokenizer, rows, config(), **options)
    trainer.train()
    load_and_compare(trainer, tmp_path / "run" / "checkpoint-1", resized(bases[1]))


def test_a_reward_model_with_a_chat_template(tokenizer, tmp_path):
    template_of(tokenizer, tmp_path / "source")
    question, good, bad = (
        {"role": role, "content": words(5, seed)}
        for seed, role in enumerate(("user", "assistant", "assistant"), start=1)
    )
    rows = Dataset.from_list([{"chosen": [question, good], "rejected": [question, bad]}] * 8)

    def reward_model():
        torch.manual_seed(3)
        return AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1))

    trainer = RewardTrainer(
        model=reward_model(),
        args=RewardConfig(
            str(tmp_path / "run"),
            learning_rate=0.1,
            max_steps=2,
            save_steps=2,
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            chat_template_path=str(tmp_path / "source"),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=PrefixExtConfig(task_type="SEQ_CLS", num_virtual_tokens=6),
    )
    trainer.train()
    load_and_compare(trainer, tmp_path / "run" / "checkpoint-2", resized(reward_model()))


NEW_TOKENS = [VOCABULARY, VOCABULARY + 1]


def template_of(tokenizer, folder):
    """Saves a tokenizer with a chat template, whose tokens `tokenizer` has not."""
    source = copy.deepcopy(tokenizer)
    source.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    source.chat_template = (
        "{% for message in messages %}<|im_start|> {{ message['content'] }} <|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> {% endif %}"
    )
    source.save_pretrained(folder)


def resized(model):
    """Returns `model` with a row for each token, as TRL made it, up to a multiple of 64."""
    model.resize_token_embeddings(192, mean_resizing=False)
    return model


def load_and_compare(trainer, folder, base):
    """Checks that what was saved is what was trained, and that a server says why it cannot serve it."""
    model, ids = trainer.model.eval(), torch.tensor([[7, *NEW_TOKENS, 9]])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("trainable_tokens_delta" in name for name in trained)
    assert any("prefix_ext_" in name for name in trained)
    loaded = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(PrefixCheckpointError, match=r"beside the prefix .* without `modules_to_save`, `trainable_tok"):
        read_prefix(folder)


def test_the_reference_of_dpo_is_the_base_model_or_the_initial_prefix(tokenizer, tmp_path):
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
