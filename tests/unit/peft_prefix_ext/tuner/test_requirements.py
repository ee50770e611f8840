"""User errors are refused in one sentence, if possible before the model changes."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, StaticCache

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_config, tiny_model
from helpers.tiny_seq2seq import tiny_encoder_decoder
from peft_prefix_ext import PrefixExtConfig

IDS = random_ids(2, 9)
PREFIX = {"num_virtual_tokens": 4, "init_std": 1.0}


def classifier():
    return AutoModelForSequenceClassification.from_config(tiny_config("llama"))


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(
    ("base", "task_type", "more", "message"),
    [
        (
            classifier,
            "CAUSAL_LM",
            {},
            "must not be CAUSAL_LM for LlamaForSequenceClassification, which does not generate",
        ),
        (lambda: tiny_model("llama"), "SEQ_2_SEQ_LM", {}, "must be CAUSAL_LM for LlamaForCausalLM, got SEQ_2_SEQ_LM"),
        (lambda: tiny_encoder_decoder("t5"), "CAUSAL_LM", {}, "must be SEQ_2_SEQ_LM for T5ForCond.*, got CAUSAL_LM"),
        (
            lambda: tiny_model("llama"),
            "SEQ_CLS",
            {},
            "a head called 'classifier' or 'score', which LlamaForCausalLM does not have",
        ),
        (
            lambda: tiny_model("llama"),
            "QUESTION_ANS",
            {},
            "a head called 'qa_outputs', which LlamaForCausalLM does not have",
        ),
        (classifier, "SEQ_CLS", {"modules_to_save": ["scores"]}, r"must be modules of .*, got \['scores'\]"),
        (
            lambda: tiny_model("llama"),
            "CAUSAL_LM",
            {"trainable_token_indices": {"wte": [3]}},
            "`trainable_token_indices` must be of modules of LlamaForCausalLM, got 'wte'",
        ),
        (
            lambda: tiny_model("llama"),
            "CAUSAL_LM",
            {"trainable_token_indices": [3, 128]},
            "`trainable_token_indices` must be >= 0 and < 128, the vocabulary of the model, got 128",
        ),
        (
            lambda: tiny_model("llama"),
            "CAUSAL_LM",
            {"trainable_token_indices": {"embed_tokens": [3]}, "modules_to_save": ["embed_tokens"]},
            "must not be of 'embed_tokens', all of which `modules_to_save` trains",
        ),
    ],
)
def test_task_types_and_modules_of_another_model(base, task_type, more, message):
    model = base()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, PrefixExtConfig(task_type=task_type, **PREFIX, **more))
    assert not any("prefix_ext" in name for name, _ in model.named_modules())


def test_an_adapter_without_the_head_of_its_task_type(tmp_path):
    with_prefix(tiny_model("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must not be CAUSAL_LM for LlamaForSequenceClassification"):
        PeftModel.from_pretrained(classifier(), tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.task_type = "SEQ_CLS"
    with pytest.raises(ValueError, match=r"no weights 'base_model.model.score.weight' for a module that `task_type`"):
        PeftModel.from_pretrained(classifier(), tmp_path, config=config)


def test_a_base_model_of_another_name_warns(tmp_path):
    for name in ("base", "instruct"):
        tiny_model("llama").save_pretrained(tmp_path / name)
    base, instruct = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "instruct"))
    with_prefix(base).save_pretrained(tmp_path / "adapter")
    with pytest.warns(
        UserWarning, match=r"was trained on .*base and is loaded on .*instruct: the architecture fits"
    ) as told:
        PeftModel.from_pretrained(instruct, tmp_path / "adapter")
    assert sum("is loaded on" in str(warning.message) for warning in told) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The adapter was trained on")
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_text_longer_than_the_positions_of_the_model(name):
    model = with_prefix(tiny_model(name, max_position_embeddings=32), num_virtual_tokens=7)
    assert logits(model, random_ids(1, 25)).shape[1] == 25
    with pytest.raises(
        ValueError, match="ends at position 32, behind 7 virtual tokens, and the model has 32 positions"
    ):
        logits(model, random_ids(1, 26))
    with pytest.raises(ValueError, match="ends at position 32"):
        model.generate(input_ids=random_ids(1, 24), max_new_tokens=4, do_sample=False)
    assert logits(model, random_ids(1, 25)).isfinite().all()


def test_a_conversation_that_continues_with_another_prefix(llama):
    model = with_prefix(llama)
    for name, p in (("long", 9), ("as long", 7)):
        model.add_adapter(name, PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=p, init_std=1.0))
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="would continue at wrong positions"), model.disable_adapter():
        model(input_ids=IDS[:, :1], past_key_values=cache)
    model.set_adapter("long")
    with pytest.raises(ValueError, match="would continue at wrong positions"):
        model(input_ids=IDS[:, :1], past_key_values=cache)
    model.set_adapter("as long")
    model(input_ids=IDS[:, :1], past_key_values=cache)
    static = StaticCache(config=model.config, max_cache_len=20)
    for name in ("default", "long"):
        model.set_adapter(name)
        torch.testing.assert_close(model(input_ids=IDS, past_key_values=static).logits, logits(model))
        static.reset()
    with model.disable_adapter():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="start with an empty cache"):
        model(input_ids=IDS[:, :1], past_key_values=cache)


def test_adapter_names_with_a_dot(llama):
    with pytest.raises(ValueError, match=r"must not have a dot in it, got 'a\.b'"):
        get_peft_model(llama, PrefixExtConfig(**PREFIX), adapter_name="a.b")
    assert not any("prefix_ext" in name for name, _ in llama.named_modules())


def test_adapters_of_two_types_in_one_peft_model(llama, tmp_path):
    prefix = with_prefix(tiny_model("llama"))
    prefix.save_pretrained(tmp_path)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(
        ValueError, match=r"LORA cannot go into a `PeftModel` of type PREFIX_EXT: put it on `model.get_base"
    ):
        prefix.add_adapter("tone", config)
    lora = get_peft_model(llama, config, adapter_name="tone")
    for add in (
        lambda: lora.add_adapter("task", PrefixExtConfig(task_type="CAUSAL_LM", **PREFIX)),
        lambda: lora.load_adapter(tmp_path, "task"),
    ):
        with pytest.raises(ValueError, match="PREFIX_EXT cannot go into a `PeftModel` of type LORA"):
            add()
    both = PeftModel.from_pretrained(lora.get_base_model(), tmp_path, adapter_name="task")
    assert torch.equal(logits(both), logits(lora))


def test_methods_that_only_lora_has(llama, tmp_path):
    model = with_prefix(llama)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but PREFIX_EXT was passed"):
        hotswap_adapter(model, str(tmp_path), "default")
    with pytest.raises(ValueError, match="nothing to unmerge"):
        model.unmerge_adapter()
    assert not model.supports_lora_conversion()
    with disable_input_dtype_casting(model):
        logits(model)
    for wrap in (PeftMixedModel, lambda base, config: get_peft_model(base, config, mixed=True)):
        with pytest.raises(ValueError, match="'PREFIX_EXT' is not compatible with the `PeftMixedModel`"):
            wrap(tiny_model("llama"), PrefixExtConfig(**PREFIX))


@pytest.mark.usefixtures("methods_of_transformers")
def test_several_adapters_with_methods_of_transformers(llama):
    llama.add_adapter(LoraConfig(init_lora_weights=False, target_modules=["q_proj"]), "lora")
    lora = logits(llama)
    llama.add_adapter(PrefixExtConfig(**PREFIX), "task")
    task = logits(llama)
    llama.set_adapter(["lora", "task"])
    both = logits(llama)
    assert all(not torch.allclose(both, one, atol=1e-2) for one in (lora, task))
    llama.set_adapter(["task", "lora"])
    assert torch.equal(logits(llama), both)
    llama.add_adapter(PrefixExtConfig(**PREFIX), "other")
    with pytest.raises(ValueError, match=r"one active adapter at a time, got \['task', 'other'\]"):
        llama.set_adapter(["task", "other"])
