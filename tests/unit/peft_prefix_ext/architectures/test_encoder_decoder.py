"""T5, BART and related models: prefixes in the decoder, in the encoder and in cross-attention."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from packaging import version
from peft import PrefixTuningConfig, get_peft_model
from transformers.modeling_outputs import BaseModelOutput

from helpers.prefixed import perturb, with_prefix
from helpers.prefixed_seq2seq import EVERYWHERE, READ, VIRTUAL, WRITTEN, greedy, layers_by_name, logits, prefixed
from helpers.tiny_seq2seq import ENCODER_DECODERS, OTHER_ENCODERS, tiny_encoder_decoder
from peft_prefix_ext.base_model.layers import record_layers
from peft_prefix_ext.injection.reparam import PrefixMLP


@torch.no_grad()
def start_from(model, probed):
    """Sets the prefix to the K/V of tokens, in the layers that have one."""
    layers = layers_by_name(model)
    for layer in probed:
        if layer.module in layers:
            layers[layer.module].prefix_ext_key["default"].copy_(layer.kv.key)
            layers[layer.module].prefix_ext_value["default"].copy_(layer.kv.value)


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
    probed = {layer.module: layer for layer in record_layers(base, VIRTUAL, input_ids=None, encoder_outputs=both)}
    start_from(model, [layer for layer in probed.values() if layer.attention == "decoder"])
    torch.testing.assert_close(logits(model, WRITTEN[:1], READ[:1]), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "bart", "m2m_100"])
def test_prefix_in_the_encoder_equals_its_tokens_before_the_text(name):
    """In one layer; with more, the tokens would see the text too."""
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
        for layer in layers_by_name(ours).values():
            layer.prefix_ext_key["default"].copy_(rows[2 * layer.index % 3, 0])
            layer.prefix_ext_value["default"].copy_(rows[2 * layer.index % 3, 1])
    assert torch.equal(logits(ours), logits(stock))
    with stock.disable_adapter():
        base_answers = greedy(stock)
    # PEFT 0.21 loses its prefix when transformers 5.24 generates.
    generates = not torch.equal(greedy(stock), base_answers)
    assert generates or version.parse(transformers.__version__) >= version.parse("5.24")
    assert not generates or torch.equal(greedy(ours), greedy(stock))
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
    counts_columns = base.config.model_type not in (
        "t5",
        "mt5",
        "m2m_100",
    )  # left padding moves the text in the base model
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
        # Under checkpointing T5's bias requires a gradient, for which torch uses another kernel.
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


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_half_precision_runs(name):
    model = prefixed(tiny_encoder_decoder(name).bfloat16(), **EVERYWHERE)
    assert logits(model).isfinite().all()
    assert greedy(model).shape == (2, 10)


def test_a_mixed_batch_is_refused():
    model = prefixed(tiny_encoder_decoder("t5"))
    with pytest.raises(ValueError, match="`adapter_names` is not supported for encoder-decoder models"):
        logits(model, adapter_names=["default", "__base__"])


def test_decoder_only_models_refuse_encoder_options(llama):
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
