"""Adapters of T5, BART and related models: saving, reading, composing, initialization, `Trainer`, verification."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from helpers.prefixed import perturb, with_prefix
from helpers.prefixed_seq2seq import EVERYWHERE, READ, VIRTUAL, WRITTEN, greedy, layers_by_name, logits, prefixed
from helpers.tiny_seq2seq import tiny_encoder_decoder
from peft_prefix_ext import PrefixExtConfig, compose, export_to_peft, import_from_peft, read_prefix
from peft_prefix_ext.base_model.layers import record_layers
from peft_prefix_ext.checkpoint.summary import as_text
from peft_prefix_ext.conversion.verify import verify


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("reparam", ["none", "mlp"])
@pytest.mark.parametrize("layers", [None, [0, 3]], ids=["all layers", "some of the decoder"])
def test_saved_and_loaded(name, reparam, layers, tmp_path):
    settings = {"reparam": reparam, "num_frozen_tokens": 1, "layers_to_train": layers, **EVERYWHERE}
    model = prefixed(tiny_encoder_decoder(name), **settings)
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_encoder_decoder(name), tmp_path)), expected)
    resumed = PeftModel.from_pretrained(tiny_encoder_decoder(name), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(resumed), expected)
    fresh = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for key, parameter in resumed.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, fresh.pop(key)), key
    assert not fresh


def test_reader_tells_kinds_of_attention_apart(tmp_path):
    model = prefixed(tiny_encoder_decoder("t5"), **EVERYWHERE)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| attention with a prefix | decoder, cross, encoder |" in card
    assert "vllm serve" not in card
    read = read_prefix(tmp_path)
    assert read.is_encoder_decoder
    assert list(read.attentions.values()) == ["decoder"] * 2 + ["cross"] * 2 + ["encoder"] * 3
    assert "2-3: cross keys [4, 7, 24], values [4, 7, 24]" in as_text(read)
    for layer in layers_by_name(model).values():
        assert read.attentions[layer.index] == layer.attention
        for ours, theirs in zip(layer.materialize("default", None), read.layers[layer.index], strict=True):
            assert torch.equal(ours, theirs)


def test_reader_reads_stock_adapters(tmp_path):
    base = tiny_encoder_decoder("bart")
    stock = get_peft_model(
        copy.deepcopy(base), PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=7)
    ).eval()
    stock.save_pretrained(tmp_path)
    read = read_prefix(tmp_path)
    assert read.is_encoder_decoder
    import_from_peft(tmp_path, tmp_path / "ours", base)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "ours")), logits(stock))
    with pytest.raises(ValueError, match="layers of an encoder-decoder model share their prefixes"):
        export_to_peft(tmp_path / "ours", tmp_path / "theirs")


@torch.no_grad()
def test_prefixes_compose(tmp_path):
    base = tiny_encoder_decoder("t5")
    model = prefixed(copy.deepcopy(base), **EVERYWHERE)
    model.save_pretrained(tmp_path)
    composed = compose([tmp_path, tmp_path], tmp_path / "twice", base_model=base)
    assert composed.num_virtual_tokens == 14
    twice = PeftModel.from_pretrained(base, tmp_path / "twice")
    for name, layer in layers_by_name(twice).items():
        once = layers_by_name(model)[name].materialize("default", None).key
        assert torch.equal(layer.materialize("default", None).key, torch.cat([once, once], dim=1))
    with pytest.raises(ValueError, match="compose with `positions='keep'`"):
        compose([tmp_path, tmp_path], tmp_path / "shifted", positions="shift", base_model=base)


def test_adapters_with_prefixes_in_other_places(tmp_path):
    base = tiny_encoder_decoder("bart")
    plain = logits(base)
    model = prefixed(base)
    first = logits(model)
    config = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 4, "init_std": 1.0, **EVERYWHERE}
    model.add_adapter("all", PrefixExtConfig(**config, reparam="mlp"))
    assert torch.equal(logits(model), first)
    model.set_adapter("all")
    second = logits(model)
    assert not torch.allclose(second, first, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_encoder_decoder("bart"), tmp_path)), first)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_encoder_decoder("bart"), tmp_path / "all")), second)
    model.delete_adapter("all")
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.unload()), plain)
    assert not any("prefix_ext" in name for name, _ in base.named_modules())


def test_text_initializes_encoder_and_decoder(word_tokenizer):
    text = {"init": "text", "init_text": "w5 w17 w40", "tokenizer_name_or_path": word_tokenizer}
    base = tiny_encoder_decoder("t5")
    expected = {layer.module: layer.kv for layer in record_layers(base, [1, 5, 17, 40])}
    layers = layers_by_name(prefixed(base, num_virtual_tokens=4, **text, **EVERYWHERE))
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        for ours, theirs in zip(layer.materialize("default", None), expected[name], strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_starts_from_the_cache_of_an_encoder_decoder_model():
    base = tiny_encoder_decoder("t5")
    cache = base(input_ids=READ[:1, :7], decoder_input_ids=torch.tensor([VIRTUAL])).past_key_values
    settings = {"init": "kv", "init_kv": cache, "num_virtual_tokens": 7}
    layers = layers_by_name(prefixed(base, cross_prefix=True, **settings))
    written = [layer for part in (cache.self_attention_cache, cache.cross_attention_cache) for layer in part.layers]
    for layer, given in zip(sorted(layers.values(), key=lambda layer: layer.index), written, strict=True):
        key, value = layer.materialize("default", None)
        assert torch.equal(key, given.keys[0])
        assert torch.equal(value, given.values[0])
    with pytest.raises(ValueError, match="`init_kv` must have K/V for layers"):
        prefixed(tiny_encoder_decoder("t5"), **settings, **EVERYWHERE)


def test_seq2seq_trainer_trains_and_generates(tmp_path):
    model = prefixed(tiny_encoder_decoder("t5"), init_std=0.02, reparam="mlp", **EVERYWHERE)
    rows = [{"input_ids": read, "labels": written} for read, written in zip(READ, WRITTEN, strict=True)] * 4
    settings = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=8,
        learning_rate=0.02,
        predict_with_generate=True,
        generation_max_length=7,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(model, settings, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.3
    assert trainer.predict(rows[:2]).predictions[:, :7].tolist() == greedy(model, max_new_tokens=6).tolist()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_classifiers(name):
    config = tiny_encoder_decoder(name).config
    config.eos_token_id = 5
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    ids = torch.cat([READ, torch.full((2, 1), 5)], dim=1)
    with pytest.raises(ValueError, match=r"a head called 'classifier' or 'score', which .* does not have"):
        with_prefix(model, task_type="SEQ_CLS")
    prefixed = with_prefix(model, task_type="SEQ_CLS", modules_to_save=["classification_head"], **EVERYWHERE)
    prefixed(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in prefixed.parameters() if p.requires_grad)
    with prefixed.disable_adapter():
        base = prefixed(input_ids=ids).logits
    assert not torch.allclose(prefixed(input_ids=ids).logits, base)


def test_verified_against_its_base(tmp_path):
    base = tiny_encoder_decoder("t5")
    prefixed(copy.deepcopy(base), **EVERYWHERE).save_pretrained(tmp_path)
    assert "it works" in list(verify(tmp_path, base))[-1]
