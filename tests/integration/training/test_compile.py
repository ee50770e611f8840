"""`torch.compile`: one graph with the prefix in it, which follows changes of the adapter and its weights."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import CompileConfig

from helpers.prefixed import perturb, with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def captured(model):
    """The model as one graph, run op by op: what the compiler sees without what it makes of it."""
    return torch.compile(model, fullgraph=True, backend="eager")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_a_graph_follows_the_adapter_and_its_weights():
    model = with_prefix(tiny_model("gemma3", num_hidden_layers=2), reparam="mlp")  # one layer of each kind
    perturb(model)
    model.add_adapter("long", PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=11, init_std=1.0))
    compiled, ids = captured(model), random_ids(2, 30)

    def check():
        assert torch.equal(logits(compiled, ids), logits(model, ids))

    check()
    perturb(model)
    check()
    model.set_adapter("long")
    check()
    with model.disable_adapter():
        check()
    model.set_adapter("default")
    check()


@pytest.mark.parametrize(("reparam", "checkpointing"), [("none", None), ("mlp", False), ("mlp", True)])
def test_gradients_of_a_compiled_model(reparam, checkpointing):
    model = with_prefix(tiny_model("llama", num_hidden_layers=1), reparam=reparam, num_frozen_tokens=2).train()
    perturb(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    ids = random_ids(2, 12)

    def gradients(model):
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {
            name.removeprefix("_orig_mod."): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
        }

    expected = gradients(model)
    actual = gradients(torch.compile(model, fullgraph=checkpointing is None, backend="aot_eager"))
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], atol=1e-6, rtol=1e-4, msg=key)


@torch.no_grad()
def test_generation_compiles_its_decoding_steps():
    model = with_prefix(tiny_model("llama", num_hidden_layers=1), reparam="mlp")
    perturb(model)
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # transformers compiles on accelerators alone, unless told
    ids = random_ids(2, 9)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids=ids, **options)
    options |= {"cache_implementation": "static", "compile_config": compile_config}
    assert torch.equal(model.generate(input_ids=ids, **options), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    perturb(model)
    expected = model.generate(input_ids=ids, **{**options, "compile_config": None})
    assert torch.equal(model.generate(input_ids=ids, **options), expected)


def test_inductor_compiles_a_loaded_adapter(tmp_path):
    with_prefix(tiny_model("llama", num_hidden_layers=1)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=1), tmp_path)
    ids = random_ids(1, 8)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids), atol=1e-5, rtol=1e-4)
