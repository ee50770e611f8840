"""A prefix on top of LoRA, and LoRA on top of a prefix: both train, save and load."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from helpers.prefixed import perturb
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixCheckpointError, PrefixExtConfig, compose, export_to_peft, read_prefix
from peft_prefix_ext.cli import main

IDS = random_ids(2, 9)
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
PREFIX = PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, init_std=1.0, reparam="mlp")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trainable(model):
    return {
        name.rpartition("prefix_ext_" if "prefix_ext_" in name else "lora_")[1]
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.fixture
def lora(llama):
    torch.manual_seed(0)
    model = get_peft_model(llama, LORA)
    perturb(model)
    return model


@pytest.fixture
def both(lora):
    with pytest.warns(UserWarning, match="second time"):
        model = get_peft_model(lora, PREFIX, adapter_name="prefix")
    perturb(model)
    return model


def test_both_train_or_lora_stays_frozen(lora, both):
    assert trainable(both) == {"lora_", "prefix_ext_"}
    both.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in both.parameters() if p.requires_grad)
    lora.set_requires_grad("default", False)
    assert trainable(both) == {"prefix_ext_"}


def test_lora_that_was_loaded_stays_frozen(lora, tmp_path):
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    both = get_peft_model(loaded, PREFIX, adapter_name="prefix")
    assert trainable(both) == {"prefix_ext_"}


SILENT = pytest.mark.filterwarnings("error:The prefix was trained on")


@SILENT
@pytest.mark.parametrize("handle", ["lora", "both"])
def test_both_are_saved_and_loaded(handle, lora, both, tmp_path):
    expected = logits(both)
    assert torch.equal(logits(lora), expected)  # one base under both
    {"lora": lora, "both": both}[handle].save_pretrained(tmp_path)
    assert all(".lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert read_prefix(tmp_path / "prefix").num_virtual_tokens == 5

    first = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    second = PeftModel.from_pretrained(first, tmp_path / "prefix", adapter_name="prefix")
    torch.testing.assert_close(logits(second), expected, atol=1e-5, rtol=1e-5)
    resumed = PeftModel.from_pretrained(
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True),
        tmp_path / "prefix",
        adapter_name="prefix",
        is_trainable=True,
    )
    assert trainable(resumed) == {"lora_", "prefix_ext_"}
    torch.testing.assert_close(logits(resumed), expected, atol=1e-5, rtol=1e-5)
    lean = {"low_cpu_mem_usage": True}
    first = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, adapter_name="lora", **lean)
    second = PeftModel.from_pretrained(first, tmp_path / "prefix", **lean)
    torch.testing.assert_close(logits(second), expected, atol=1e-5, rtol=1e-5)
    second.load_adapter(tmp_path / "prefix", "again", **lean)
    second.load_adapter(tmp_path / "prefix", "again")


def test_each_alone(lora, both, tmp_path):
    alone = logits(get_peft_model(tiny_model("llama"), LORA))
    both.save_pretrained(tmp_path)
    with both.disable_adapter():
        assert torch.equal(logits(both), logits(tiny_model("llama")))
    with pytest.warns(UserWarning, match="and is loaded on the base model alone"):
        prefix_alone = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "prefix")
    assert not torch.allclose(logits(prefix_alone), logits(both), atol=1e-2)
    both.unload()
    assert list(lora.peft_config) == ["default"]
    assert not torch.allclose(logits(lora), alone, atol=1e-2)
    fresh = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(lora), logits(fresh))


def test_lora_merges_under_the_prefix(lora, both):
    expected = logits(both)
    lora.merge_and_unload()
    torch.testing.assert_close(logits(both), expected, atol=1e-4, rtol=1e-4)


def save_both(both, folder):
    """Saves LoRA and the prefix; returns the phrase for LoRA."""
    both.save_pretrained(folder)
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    (base_adapter,) = read_prefix(folder / "prefix").base_adapters
    assert (base_adapter.name, base_adapter.peft_type, base_adapter.digest) == ("default", "LORA", digest)
    return f"the base model with LORA adapter 'default' \\(sha256 {digest[:16]}\\)"


def test_active_base_adapters_are_recorded(lora, both, tmp_path):
    save_both(both, tmp_path / "on")
    with both.disable_adapter():
        save_both(both, tmp_path / "for a while")
    for module in both.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
    both.save_pretrained(tmp_path / "off")
    assert read_prefix(tmp_path / "off" / "prefix").base_adapters == ()
    lora.merge_and_unload()
    both.save_pretrained(tmp_path / "merged")
    assert read_prefix(tmp_path / "merged" / "prefix").base_adapters == ()


@SILENT
def test_rounded_weights_are_the_same_adapter(lora, both, tmp_path):
    save_both(both, tmp_path)
    half = tiny_model("llama").to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(half, tmp_path, autocast_adapter_dtype=False)
    assert {p.dtype for name, p in loaded.named_parameters() if "lora_" in name} == {torch.bfloat16}
    PeftModel.from_pretrained(loaded, tmp_path / "prefix", adapter_name="prefix")


def test_another_base_adapter_warns(lora, both, tmp_path):
    phrase = save_both(both, tmp_path)
    prefix = tmp_path / "prefix"
    alone = f"The prefix was trained on {phrase} and is loaded on the base model alone"
    with pytest.warns(UserWarning, match=alone) as told:
        model = PeftModel.from_pretrained(tiny_model("llama"), prefix)
    assert len([warning for warning in told if "is loaded on" in str(warning.message)]) == 1
    model.save_pretrained(tmp_path / "alone")
    with pytest.warns(UserWarning, match=alone):
        model.load_adapter(prefix, "again")
    with pytest.warns(UserWarning, match=alone):
        get_peft_model(tiny_model("llama"), PREFIX).load_adapter(prefix, "default")
    with pytest.warns(UserWarning, match=alone):
        tiny_model("llama").load_adapter(str(prefix))
    other = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    perturb(other)
    with pytest.warns(UserWarning, match=rf"{phrase} and is loaded on the base model with LORA adapter 'default' "):
        PeftModel.from_pretrained(other, prefix, adapter_name="prefix")
    first = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    with pytest.warns(UserWarning, match=r"trained on the base model alone and is loaded .* take them off"):
        PeftModel.from_pretrained(first, tmp_path / "alone", adapter_name="prefix")


def test_every_conversion_keeps_the_base_adapters(lora, both, tmp_path, capsys):
    phrase = save_both(both, tmp_path)
    prefix = str(tmp_path / "prefix")
    assert compose([prefix, prefix], tmp_path / "twice").base_adapters == read_prefix(prefix).base_adapters
    with pytest.raises(ValueError, match=f"stock PEFT, which does not know that it was trained on {phrase}"):
        export_to_peft(prefix, tmp_path / "stock")
    main(["inspect", prefix])
    assert "  on top of   LORA adapter 'default' (sha256 " in capsys.readouterr().out
    tiny_model("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit, match="1"):
        main(["verify", prefix, "--base", str(tmp_path / "base")])
    assert "'default'" in (told := capsys.readouterr().err)
    assert told.endswith(", and this is the base model alone.\n")
    with pytest.warns(UserWarning, match="is loaded on the base model alone"):
        PeftModel.from_pretrained(tiny_model("llama"), prefix).save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match=f"trained on different models: {phrase}, and the base model alone"):
        compose([prefix, tmp_path / "alone"], tmp_path / "mixed")
    path = tmp_path / "prefix" / "adapter_config.json"
    for wrong in ({"peft_type": "LORA"}, [3], [{"name": "x", "peft_type": "LORA", "digest": 5}]):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_adapters": wrong}))
        with pytest.raises(PrefixCheckpointError, match="`base_adapters` must be a list of dicts with"):
            read_prefix(prefix)


def test_lora_on_top_of_a_prefix(llama, tmp_path):
    prefix = get_peft_model(llama, PREFIX)
    perturb(prefix)
    both = get_peft_model(prefix.get_base_model(), LORA, adapter_name="lora")
    assert trainable(both) == {"lora_", "prefix_ext_"}
    perturb(both)
    expected = logits(both)
    both.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"LORA adapter 'lora' .* is loaded on the base model alone"):  # not yet
        first = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    second = PeftModel.from_pretrained(first.get_base_model(), tmp_path / "lora", adapter_name="lora")
    torch.testing.assert_close(logits(second), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_with_and_without_prefix_on_lora(lora, both):
    both.eval()
    bare = logits(tiny_model("llama"))
    mixed = both(input_ids=IDS, adapter_names=["prefix", "__base__"]).logits
    torch.testing.assert_close(mixed[:1], logits(both)[:1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mixed[1], bare[1], atol=1e-2)  # LoRA is at work in every row
    both.unload()
    torch.testing.assert_close(mixed[1:], logits(lora)[1:], atol=1e-5, rtol=1e-4)


def test_unsupported_combinations_are_refused(lora, both):
    with pytest.raises(ValueError, match="'default' is of type LORA, not a prefix"):
        both.set_adapter("default")
    with pytest.raises(ValueError, match="'default' is of type LORA, not a prefix"):
        both.delete_adapter("default")
    before = logits(both)
    with pytest.raises(ValueError, match="has an adapter 'default' of type LORA already"):
        get_peft_model(lora, PREFIX)
    assert torch.equal(logits(both), before)
    prompt = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="cannot be added to an adapter of type PROMPT_TUNING"):
        get_peft_model(prompt, PREFIX)
