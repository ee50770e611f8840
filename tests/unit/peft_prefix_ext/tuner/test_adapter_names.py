"""`adapter_names`: each row of a batch has its own prefix, with the outputs it has alone."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, DynamicCache

from helpers.prefixed import perturb, with_prefix
from helpers.tiny import random_ids, tiny_config, tiny_model
from peft_prefix_ext import PrefixExtConfig

NAMES = ["default", "__base__", "mlp", "long"]
LENGTH = 30  # longer than the sliding windows of the tiny models


def three_prefixes(base):
    """Adapters of 7, 5 and 11 virtual tokens, the second with a reparameterization."""
    model = with_prefix(base, num_frozen_tokens=2)
    for name, settings in (
        ("mlp", {"num_virtual_tokens": 5, "reparam": "mlp"}),
        ("long", {"num_virtual_tokens": 11}),
    ):
        model.add_adapter(name, PrefixExtConfig(task_type="CAUSAL_LM", init_std=1.0, **settings))
        model.set_adapter(name)
        perturb(model)
    model.set_adapter("default")
    return model.eval()


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2"])
def model(request):
    return three_prefixes(tiny_model(request.param))


def alone(model, name, call):
    """Runs `call` with one adapter for the whole batch."""
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    try:
        return call()
    finally:
        model.set_adapter("default")


def padded(lengths, side):
    """Returns ids and mask of rows of these lengths, padded on the left or right."""
    ids, mask = (
        torch.zeros(len(lengths), max(lengths), dtype=torch.long),
        torch.zeros(len(lengths), max(lengths)).long(),
    )
    for row, length in enumerate(lengths):
        place = slice(max(lengths) - length, None) if side == "left" else slice(length)
        ids[row, place], mask[row, place] = random_ids(length, seed=row), 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_equals_the_row_alone(model, side):
    lengths = [30, 30, 21, 12]
    ids, mask = padded(lengths, side)
    mixed = model(input_ids=ids, attention_mask=mask, adapter_names=NAMES).logits
    for row, (name, length) in enumerate(zip(NAMES, lengths, strict=True)):
        real = mask[row].bool()
        single = alone(model, name, lambda row=row, real=real: model(input_ids=ids[row][real][None]).logits)
        assert len(single[0]) == length
        torch.testing.assert_close(mixed[row][real], single[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_mask_and_positions(attention):
    model = three_prefixes(tiny_model("llama", attention=attention))
    ids = random_ids(4, 9)
    mixed = model(input_ids=ids, adapter_names=NAMES)
    step = model(input_ids=ids[:, :1], past_key_values=mixed.past_key_values, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        single = alone(
            model, name, lambda row=row: model(input_ids=torch.cat([ids, ids[:, :1]], 1)[row : row + 1]).logits
        )
        torch.testing.assert_close(mixed.logits[row], single[0, :-1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(step[row], single[0, -1:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
    ids=str,
)
def test_generation_equals_each_row_alone(model, options):
    lengths = [30, 30, 17, 9]
    ids, mask = padded(lengths, "left")
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    mixed = model.generate(input_ids=ids, attention_mask=mask, adapter_names=NAMES, **options)[:, ids.shape[1] :]
    copies = options.get("num_return_sequences", 1)
    for row, name in enumerate(NAMES):
        text = ids[row][mask[row].bool()][None]
        single = alone(
            model,
            name,
            lambda text=text: model.generate(input_ids=text, attention_mask=torch.ones_like(text), **options),
        )
        assert torch.equal(mixed[row * copies : (row + 1) * copies], single[:, text.shape[1] :])


@torch.no_grad()
def test_sampling_equals_that_of_a_batch_with_one_adapter(model):
    ids = random_ids(4, LENGTH)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": True}

    def sample(**more):
        torch.manual_seed(3)
        return model.generate(input_ids=ids, **options, **more)

    assert torch.equal(sample(adapter_names=["long"] * 4), alone(model, "long", sample))


@pytest.mark.parametrize("name", ["mpt", "gpt_neo"])
def test_models_with_column_distances_are_refused(name):
    model = three_prefixes(tiny_model(name, attention="eager"))
    with pytest.raises(ValueError, match="`adapter_names` is not supported for"):
        model(input_ids=random_ids(4, 9), adapter_names=NAMES)


@torch.no_grad()
def test_all_rows_without_a_prefix(model):
    ids = random_ids(2, LENGTH)
    assert torch.equal(
        model(input_ids=ids, adapter_names=["__base__"] * 2).logits,
        alone(model, "__base__", lambda: model(input_ids=ids).logits),
    )


@torch.no_grad()
def test_rows_that_change_places_on_one_cache_are_refused(llama):
    """The tokens of each row stand behind the prefix that it had."""
    model = three_prefixes(llama)
    ids = random_ids(4, 6)
    cache = model(input_ids=ids, adapter_names=NAMES).past_key_values
    for names in (NAMES[::-1], ["default"] * 4, None):
        options = {"adapter_names": names} if names else {}
        with pytest.raises(ValueError, match="start with an empty cache"):
            model(input_ids=ids[:, :1], past_key_values=cache, **options)
    model(input_ids=ids[:, :1], past_key_values=cache, adapter_names=NAMES)


def test_gradients_are_those_of_the_row_alone(llama):
    model = three_prefixes(llama)
    model.set_requires_grad(["default", "mlp"])
    ids = random_ids(2, 6)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition("prefix_ext_")[2].split(".")[1] for name in parameters} == {"default", "mlp"}
    model(input_ids=ids, adapter_names=["default", "mlp"]).logits.sum().backward()
    mixed = {name: p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()
    for row, name in enumerate(["default", "mlp"]):
        model.set_adapter(name)
        model(input_ids=ids[row : row + 1]).logits.sum().backward()
    for name, p in parameters.items():
        torch.testing.assert_close(mixed[name], p.grad, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_heads_saved_with_adapters_follow_the_rows():
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=3)).eval()
    config = PrefixExtConfig(task_type="SEQ_CLS", num_virtual_tokens=4, init_std=1.0)
    model = get_peft_model(base, config)
    perturb(model)
    model.add_adapter("other", PrefixExtConfig(task_type="SEQ_CLS", num_virtual_tokens=6, init_std=1.0))
    model.set_adapter("other")
    perturb(model)
    model.eval()
    ids = random_ids(3, 9)
    names = ["other", "__base__", "default"]
    mixed = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        single = alone(model, name, lambda row=row: model(input_ids=ids[row : row + 1]).logits)
        torch.testing.assert_close(mixed[row], single[0], atol=1e-5, rtol=1e-4)


def test_unsupported_combinations_are_refused(llama):
    model = three_prefixes(llama)
    ids = random_ids(2, 4)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): a, b"):
        model(input_ids=ids, adapter_names=["b", "a"])
    for names in (["default"], ["__base__"] * 3, ["default"] * 4):
        with pytest.raises(ValueError, match=f"the number of inputs, but got {len(names)} and 2 respectively"):
            model(input_ids=ids, adapter_names=names)
        with pytest.raises(ValueError, match=f"the number of inputs, but got {len(names)} and 2 respectively"):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, max_new_tokens=2)
    with pytest.raises(TypeError, match="expected a list of str"):
        model(input_ids=ids, adapter_names="default")
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(input_ids=ids, adapter_names=["default", "long"])
    model.eval()(input_ids=ids)  # nothing of a refused call stays behind


@torch.no_grad()
def test_decoding_recomputes_nothing(llama):
    """A reparameterization is evaluated at the prefill, whichever adapters take turns after it."""
    model = three_prefixes(llama)
    evaluations = []
    mlp = model.get_base_model().model.prefix_ext.prefix_ext_reparam["mlp"]
    mlp.register_forward_hook(lambda *_: evaluations.append(1))
    ids = random_ids(4, 6)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    model.generate(input_ids=ids, adapter_names=NAMES, **options)
    assert len(evaluations) == 1

    caches = {name: DynamicCache(config=llama.config) for name in ("mlp", "long", "default")}
    for token in range(4):
        for name, cache in caches.items():
            model.set_adapter(name)
            new = ids[:1] if token == 0 else ids[:1, token : token + 1]
            model(input_ids=new, past_key_values=cache)
    assert len(evaluations) == 2
