"""Training on a model of a few thousand parameters: it saves an adapter, and is reused until a setting changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from e2e import DESCRIBE, Restaurant, examples
from parity import generate
from peft import AutoPeftModelForCausalLM
from serve import BASE, Question
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from train import IGNORED, TrainingSettings, encode, train
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_prefix_ext import read_prefix

CHAT = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}a:"
RESTAURANTS = [Restaurant({"name": "Cotto", "eatType": kind}, (f"Cotto is a {kind}.",)) for kind in ("pub", "bar")]


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate([*alphabet, "</s>"])}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="</s>", pad_token="</s>", chat_template=CHAT)


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_encode_leaves_only_the_answer_to_learn(tokenizer):
    example = examples(DESCRIBE, RESTAURANTS)[0]
    item = encode(tokenizer, example)
    learned = [token for token in item["labels"] if token != IGNORED]
    assert tokenizer.decode(learned) == "Cotto is a pub.</s>"
    assert tokenizer.decode(item["input_ids"]).endswith("name: Cotto, eatType: pub\na:Cotto is a pub.</s>")


def test_train_saves_an_adapter_and_is_reused_until_a_setting_changes(model_folder, tmp_path):
    settings = TrainingSettings(model=model_folder, task=DESCRIBE, steps=3, num_virtual_tokens=4)
    first = train(settings, examples(DESCRIBE, RESTAURANTS), tmp_path)
    assert not first.reused
    assert len(first.losses) == 3
    prefix = read_prefix(tmp_path)
    assert prefix.num_virtual_tokens == 4

    again = train(settings, examples(DESCRIBE, RESTAURANTS), tmp_path)
    assert again == replace(first, reused=True)
    assert not train(settings, examples(DESCRIBE, RESTAURANTS[:1]), tmp_path).reused
    assert not train(replace(settings, seed=1), examples(DESCRIBE, RESTAURANTS[:1]), tmp_path).reused
    assert read_prefix(tmp_path).digest != prefix.digest


def test_an_adapter_is_found_with_its_base_from_another_folder(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(model_folder).parent)
    settings = TrainingSettings(model=Path(model_folder).name, task=DESCRIBE, steps=1, num_virtual_tokens=4)
    train(settings, examples(DESCRIBE, RESTAURANTS), tmp_path / "describe")
    monkeypatch.chdir(tmp_path)
    AutoPeftModelForCausalLM.from_pretrained("describe")


def test_generate_switches_between_prefixes_and_base(model_folder, tmp_path):
    for name, rate in (("describe", 1e-2), ("other", 1.0)):
        settings = TrainingSettings(model=model_folder, task=DESCRIBE, steps=2, learning_rate=rate)
        train(settings, examples(DESCRIBE, RESTAURANTS), tmp_path / name)
    adapters = {name: tmp_path / name for name in ("describe", "other")}
    messages = examples(DESCRIBE, RESTAURANTS)[0].messages
    order = [BASE, "other", "describe", BASE, "other"]
    answers = generate(model_folder, adapters, [Question(name, messages) for name in order])
    assert answers[0] == answers[3]
    assert answers[1] == answers[4]
    assert answers[0] != answers[1]
