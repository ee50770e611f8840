"""T5, BART and their kin: prefixes in the decoder, in the encoder and in cross-attention."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from prefixed import perturb, with_prefix
from tiny import random_ids
from tiny_seq2seq import ENCODER_DECODERS, OTHER_ENCODERS, tiny_encoder_decoder
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.modeling_outputs import BaseModelOutput

from peft_prefix_ext import PrefixExtConfig, compose, export_to_peft, import_from_peft, read_prefix
from peft_prefix_ext.geometry import record_layers
from peft_prefix_ext.layer import PrefixExtLayer
from peft_prefix_ext.reparam import PrefixMLP
from peft_prefix_ext.summary import as_text
from peft_prefix_ext.verification import verify

EVERYWHERE = {"encoder_prefix": True, "cross_prefix": True}
READ, WRITTEN, VIRTUAL = random_ids(2, 11), random_ids(2, 6, seed=3), [1, *random_ids(6, seed=5).tolist()]


def prefixed(model, **config):
    return with_prefix(model, task_type="SEQ_2_SEQ_LM", **config)


def prefix_layers(model):
    return {module.module_name: module for module in model.modules() if isinstance(module, PrefixExtLayer)}


@torch.no_grad()
def start_from(model, recorded):
    """Gives the prefix the K/V of tokens, where there are any."""
    layers = prefix_layers(model)
    for layer in recorded:
        if layer.module in layers:
            layers[layer.module].prefix_ext_key["default"].copy_(layer.kv.key)
            layers[layer.module].prefix_ext_value["default"].copy_(layer.kv.value)


def logits(model, written=WRITTEN, read=READ, **inputs):
    with torch.no_grad():
        return model(input_ids=read, decoder_input_ids=written, **inputs).logits


def greedy(model, read=READ, mask=None, **options):
    mask = torch.ones_like(read) if mask is None else mask
    options = {"max_new_tokens": 9, "do_sample": False, **options}
    return model.generate(input_ids=read, attention_mask=mask, **options)


def padded(side, count=4):
    padding = torch.zeros(2, count, dtype=torch.long)
    order = [padding, READ] if side == "left" else [READ, padding]
    return torch.cat(order, dim=1), torch.cat([torch.ones_like(part) * (part is READ) for part in order], dim=1)


@pytest.fixture(scope="module", params=list(ENCODER_DECODERS))
def base(request):
    return tiny_encoder_decoder(request.param)


def assert_prefix_equals_tokens_before(base):
    before = torch.tensor([VIRTUAL])
    expected = base(input_ids=READ[:1], decoder_input_ids=torch.cat([before, WRITTEN[:1]], dim=1)).logits[:, 7:]
    model = prefixed(copy.deepcopy(base))
    start_from(model, record_layers(base, VIRTUAL, input_ids=READ[:1]))
    torch.testing.assert_close(logits(model, WRITTEN[:1], READ[:1]), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_prefix_in_the_decoder_equals_its_tokens_before_the_text(base):
    assert_prefix_equals_tokens_before(base)


@torch.no_grad()
@pytest.mark.parametrize("name", list(OTHER_ENCODERS))
def test_decoders_of_other_encoders(name):
    base = tiny_encoder_decoder(name, attention="eager")
    assert_prefix_equals_tokens_before(base)
    with pytest.raises(ValueError, match=r"`encoder_prefix` must be False for .*, which has no encoder attention"):
        prefixed(copy.deepcopy(base), encoder_prefix=True)
    model = prefixed(base, cross_prefix=True)
    new = greedy(model)
    assert torch.equal(logits(model, new, use_cache=False)[:, :-1].argmax(-1), new[:, 1:])


@torch.no_grad()
def test_prefix_in_cross_attention_equals_more_to_read(base):
    encode = base.get_encoder()
    more, read = encode(torch.tensor([VIRTUAL])).last_hidden_state, encode(READ[:1]).last_hidden_state
    both = BaseModelOutput(last_hidden_state=torch.cat([more, read], dim=1))
    before = torch.cat([torch.tensor([VIRTUAL]), WRITTEN[:1]], dim=1)
    expected = base(encoder_outputs=both, decoder_input_ids=before).logits[:, 7:]
    model = prefixed(copy.deepcopy(base), cross_prefix=True)
    start_from(model, record_layers(base, VIRTUAL))
    recorded = {layer.module: layer for layer in record_layers(base, VIRTUAL, input_ids=None, encoder_outputs=both)}
    start_from(model, [layer for layer in recorded.values() if layer.attention == "decoder"])
    torch.testing.assert_close(logits(model, WRITTEN[:1], READ[:1]), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "bart", "m2m_100"])
def test_prefix_in_the_encoder_equals_its_tokens_before_the_text(name):
    """In one layer: in more, the tokens would see the text, too."""
    base = tiny_encoder_decoder(name, **{"num_layers" if name == "t5" else "encoder_layers": 1})
    before = torch.cat([torch.tensor([VIRTUAL]), READ[:1]], dim=1)
    expected = base.get_encoder()(before).last_hidden_state[:, 7:]
    model = prefixed(copy.deepcopy(base), encoder_prefix=True)
    start_from(model, record_layers(base, VIRTUAL))
    actual = model.get_base_model().get_encoder()(READ[:1]).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "pegasus", "m2m_100"])
def test_logits_equal_stock_prefix_tuning(name, attention):
    sizes = {"d_kv": 16, "num_decoder_layers": 3} if name == "t5" else {}
    base = tiny_encoder_decoder(name, attention=attention, **sizes)
    ours = prefixed(copy.deepcopy(base))
    stock = get_peft_model(base, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=7)).eval()
    # Stock PEFT doubles its rows for a cross-attention that it then does not use: layer i has row 2 i.
    rows = stock.prompt_encoder["default"].embedding.weight.view(7, 3, 2, 4, 16).permute(1, 2, 3, 0, 4)
    with torch.no_grad():
        for layer in prefix_layers(ours).values():
            layer.prefix_ext_key["default"].copy_(rows[2 * layer.index % 3, 0])
            layer.prefix_ext_value["default"].copy_(rows[2 * layer.index % 3, 1])
    assert torch.equal(logits(ours), logits(stock))
    assert torch.equal(greedy(ours), greedy(stock))
    with ours.disable_adapter():
        assert not torch.allclose(logits(ours), logits(stock), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("everywhere", [{}, EVERYWHERE], ids=["decoder", "everywhere"])
def test_greedy_decoding_equals_full_forward(base, everywhere):
    model = prefixed(copy.deepcopy(base), **everywhere)
    new = greedy(model)
    assert torch.equal(logits(model, new, use_cache=False)[:, :-1].argmax(-1), new[:, 1:])
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(greedy(model, **options), new)


@torch.no_grad()
def test_padding_changes_nothing(base):
    model = prefixed(copy.deepcopy(base), **EVERYWHERE)
    counts_columns = base.config.model_type not in ("t5", "mt5", "m2m_100")  # left padding moves the text in the base
    for side in ("right",) if counts_columns else ("right", "left"):
        read, mask = padded(side)
        torch.testing.assert_close(
            logits(model, read=read, attention_mask=mask), logits(model), atol=2e-5, rtol=1e-4, msg=side
        )
        assert torch.equal(greedy(model, read, mask), greedy(model))


@torch.no_grad()
def test_padding_before_the_decoders_text_changes_nothing_in_t5():
    model = prefixed(tiny_encoder_decoder("t5"), **EVERYWHERE)
    padding = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(WRITTEN)], dim=1)
    late = logits(model, torch.cat([padding, WRITTEN], dim=1), decoder_attention_mask=mask)[:, 5:]
    torch.testing.assert_close(late, logits(model), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_beam_search_equals_beam_search_over_the_text(name):
    base = tiny_encoder_decoder(name)
    before = torch.tensor([[*VIRTUAL, 1]])
    options = {"num_beams": 4, "num_return_sequences": 2}
    expected = greedy(base, READ[:1], decoder_input_ids=before, **options)[:, 7:]
    model = prefixed(base)
    with model.disable_adapter():
        start_from(model, record_layers(base, VIRTUAL, input_ids=READ[:1]))
    assert torch.equal(greedy(model, READ[:1], **options), expected)


def gradients(model):
    model.zero_grad()
    model(input_ids=READ, labels=WRITTEN).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("reparam", ["none", "mlp"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing_equal_those_without(name, reparam, reentrant):
    model = prefixed(tiny_encoder_decoder(name), reparam=reparam, num_frozen_tokens=2, **EVERYWHERE).train()
    perturb(model)
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    actual = gradients(model)
    assert expected.keys() == actual.keys()
    for key in expected:
        largest = float(expected[key].abs().max())
        assert largest > 0, key
        # Under checkpointing T5 asks for the gradient of its bias, which makes torch take another kernel.
        torch.testing.assert_close(actual[key], expected[key], atol=2e-5 * largest, rtol=0.0, msg=key)


def test_mlps_are_evaluated_once_per_stack_and_once_for_all_decoding_steps(monkeypatch):
    model = prefixed(tiny_encoder_decoder("bart"), reparam="mlp", **EVERYWHERE)
    calls = []
    project = PrefixMLP.project
    monkeypatch.setattr(PrefixMLP, "project", lambda self: calls.append(self) or project(self))
    gradients(model.train())
    assert len(calls) == len(set(calls)) == 2
    model.eval()
    with torch.no_grad():
        greedy(model)
    assert len(calls) == 4


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
    for layer in prefix_layers(model).values():
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
    for name, layer in prefix_layers(twice).items():
        once = prefix_layers(model)[name].materialize("default", None).key
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


def test_text_is_read_and_written(word_tokenizer):
    text = {"init": "text", "init_text": "w5 w17 w40", "tokenizer_name_or_path": word_tokenizer}
    base = tiny_encoder_decoder("t5")
    expected = {layer.module: layer.kv for layer in record_layers(base, [1, 5, 17, 40])}
    layers = prefix_layers(prefixed(base, num_virtual_tokens=4, **text, **EVERYWHERE))
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        for ours, theirs in zip(layer.materialize("default", None), expected[name], strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_starts_from_the_cache_of_an_encoder_decoder_model():
    base = tiny_encoder_decoder("t5")
    cache = base(input_ids=READ[:1, :7], decoder_input_ids=torch.tensor([VIRTUAL])).past_key_values
    settings = {"init": "kv", "init_kv": cache, "num_virtual_tokens": 7}
    layers = prefix_layers(prefixed(base, cross_prefix=True, **settings))
    written = [layer for part in (cache.self_attention_cache, cache.cross_attention_cache) for layer in part.layers]
    for layer, given in zip(sorted(layers.values(), key=lambda layer: layer.index), written, strict=True):
        key, value = layer.materialize("default", None)
        assert torch.equal(key, given.keys[0])
        assert torch.equal(value, given.values[0])
    with pytest.raises(ValueError, match="`init_kv` must have K/V for layers"):
        prefixed(tiny_encoder_decoder("t5"), **settings, **EVERYWHERE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_half_precision_runs(name):
    model = prefixed(tiny_encoder_decoder(name).bfloat16(), **EVERYWHERE)
    assert logits(model).isfinite().all()
    assert greedy(model).shape == (2, 10)


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
    with pytest.raises(ValueError, match=r"a head called 'classifier' or 'score', which .* has not"):
        with_prefix(model, task_type="SEQ_CLS")
    prefixed = with_prefix(model, task_type="SEQ_CLS", modules_to_save=["classification_head"], **EVERYWHERE)
    prefixed(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in prefixed.parameters() if p.requires_grad)
    with prefixed.disable_adapter():
        base = prefixed(input_ids=ids).logits
    assert not torch.allclose(prefixed(input_ids=ids).logits, base)


def test_a_mixed_batch_is_refused():
    model = prefixed(tiny_encoder_decoder("t5"))
    with pytest.raises(ValueError, match="`adapter_names` is not supported for encoder-decoder models"):
        logits(model, adapter_names=["default", "__base__"])


def test_verified_against_its_base(tmp_path):
    base = tiny_encoder_decoder("t5")
    prefixed(copy.deepcopy(base), **EVERYWHERE).save_pretrained(tmp_path)
    assert "it works" in list(verify(tmp_path, base))[-1]


def test_where_there_is_no_encoder_says_so(llama):
    for field in EVERYWHERE:
        with pytest.raises(ValueError, match=f"`{field}` must be False for LlamaForCausalLM"):
            with_prefix(llama, **{field: True})


def refused():
    t = transformers
    tiny = {"vocab_size": 32, "d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 16, "d_kv": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    whisper = {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0, **heads}
    return {
        "umt5": t.UMT5ForConditionalGeneration(t.UMT5Config(**tiny)),
        "whisper": t.WhisperForConditionalGeneration(t.WhisperConfig(**whisper)),
    }


@pytest.mark.parametrize("name", list(refused()))
def test_unsupported_models_are_refused_in_one_sentence(name):
    with pytest.raises(ValueError, match=r"not support"):
        prefixed(refused()[name])
