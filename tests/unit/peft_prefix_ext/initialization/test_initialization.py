"""Every initialization under every reparameterization: exact at step 0, seeded, trainable, saved without its source."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import DynamicCache, PreTrainedTokenizerFast

from helpers.prefixed import REPARAMS, perturb, prefix_kv, with_prefix
from helpers.tiny import VOCABULARY, random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig, read_prefix
from peft_prefix_ext.initialization.tokens import vocabulary_tokens

P = 30  # the windows of gemma3's sliding layers are 24
IDS = random_ids(2, 10)
SHOT_IDS = random_ids(P, seed=7).tolist()
TEXT = " ".join(f"w{token}" for token in SHOT_IDS[1:])


def base():
    return tiny_model("gemma3", attention="eager")


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids).logits


@torch.no_grad()
def logits_after(token_ids):
    ids = torch.cat([torch.tensor([token_ids]).expand(2, -1), IDS], dim=1)
    return logits(base(), ids)[:, len(token_ids) :]


@torch.no_grad()
def prefilled(token_ids):
    cache = DynamicCache()
    base()(input_ids=torch.tensor([token_ids]), past_key_values=cache)
    return cache


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two trained prefixes, of 30 and of 40 tokens, by folder."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {}
    for name, length in {"one": P, "two": P + 10}.items():
        model = with_prefix(base(), num_virtual_tokens=length, seed=length, reparam="mlp")
        perturb(model)
        model.save_pretrained(folder / name)
        made[str(folder / name)] = model
    return made


@pytest.fixture(scope="module")
def sources(adapters, word_tokenizer):
    """The settings of each initialization, and the expected token ids or K/V."""
    tokenizer = {"tokenizer_name_or_path": word_tokenizer}
    vocabulary = {"init": "vocab", **tokenizer}
    model = base()
    torch.manual_seed(5)
    drawn = vocabulary_tokens(PrefixExtConfig(num_virtual_tokens=P, **vocabulary), model).ids
    one, two = (prefix_kv(model) for model in adapters.values())
    path, other = adapters
    return {
        "random": ({"init": "random"}, None),
        "vocab": (vocabulary, drawn),
        "tokens": ({"init": "tokens", "init_token_ids": SHOT_IDS}, SHOT_IDS),
        "text": ({"init": "text", "init_text": TEXT, **tokenizer}, [1, *SHOT_IDS[1:]]),
        "exemplars": ({"init": "exemplars", "init_exemplars": [TEXT], **tokenizer}, [1, *SHOT_IDS[1:]]),
        "kv": ({"init": "kv", "init_kv": prefilled(SHOT_IDS)}, SHOT_IDS),
        "adapter": ({"init": "adapter", "init_adapter": path}, one),
        "average": (
            {"init": "average", "init_adapter": [path, other]},
            {name: (one[name] + two[name][:, :P]) / 2 for name in one},
        ),
    }


@pytest.mark.parametrize("form", REPARAMS)
@pytest.mark.parametrize("init", ["random", "vocab", "tokens", "text", "exemplars", "kv", "adapter", "average"])
def test_exact_at_step_0_and_saved_without_its_source(init, form, sources, tmp_path):
    settings, expected = sources[init]
    settings = {"num_virtual_tokens": P, "num_frozen_tokens": 1, **settings, **REPARAMS[form]}
    model = with_prefix(base(), seed=5, **settings)
    at_start = prefix_kv(model)
    flat = prefix_kv(with_prefix(base(), seed=5, **{**settings, "reparam": "none", "reparam_residual": True}))
    for name, kv in at_start.items():
        torch.testing.assert_close(kv, flat[name], atol=1e-5, rtol=1e-5)
    if isinstance(expected, list):
        torch.testing.assert_close(logits(model), logits_after(expected), atol=5e-5, rtol=1e-4)
    elif isinstance(expected, dict):
        for name, kv in at_start.items():
            torch.testing.assert_close(kv, expected[name], atol=1e-5, rtol=1e-5)
    again = prefix_kv(with_prefix(base(), seed=5, **settings))
    assert all(torch.equal(kv, again[name]) for name, kv in at_start.items())

    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Heads that start at zero pass no gradient on in the first step.
            assert parameter.grad.abs().max() > 0 or (form == "residual" and "heads" not in name), name
    model.zero_grad()
    perturb(model, std=0.1)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["init_exemplars"] is None
    assert saved["init_kv"] is None
    assert saved["init_report"] == model.peft_config["default"].init_report
    assert PrefixExtConfig(**saved).is_saved
    # The sources of the adapters are gone.
    moved = {
        **saved,
        "init_adapter": saved["init_adapter"] and str(tmp_path / "gone"),
        "tokenizer_name_or_path": "gone",
    }
    if init == "average":
        moved["init_adapter"] = [str(tmp_path / "gone")]
    (tmp_path / "adapter_config.json").write_text(json.dumps(moved))
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), trained)
    resumed = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert torch.equal(logits(resumed), trained)
    assert resumed.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_reports(sources, adapters):
    expected = {
        "random": "random K/V of standard deviation 1.0",
        "vocab": "tokens drawn at random from 126 of the vocabulary",
        "tokens": "token ids (30 tokens)",
        "text": "text 'w86 w",
        "exemplars": "exemplars, the first 1 row (30 tokens)",
        "kv": "given K/V",
        "adapter": "adapter 'one'",
        "average": "average of adapters 'one', 'two' (the first of 30, 40 tokens)",
    }
    expected["text"] = f"text '{TEXT[: TEXT.rindex(' ', 0, 57)]} ...' (30 tokens)"
    for init, report in expected.items():
        settings, _ = sources[init]
        model = with_prefix(base(), num_virtual_tokens=P, **settings)
        assert model.peft_config["default"].init_report == f"30 virtual tokens: {report}"


@pytest.mark.parametrize(
    ("token_ids", "length", "expected"),
    [([5, 6, 7], 2, [5, 6]), ([5, 6, 7], 3, [5, 6, 7]), ([5, 6], 5, [5, 6, 5, 6, 5])],
)
def test_tokens_are_cut_or_repeated(token_ids, length, expected):
    model = with_prefix(base(), init="tokens", init_token_ids=token_ids, num_virtual_tokens=length)
    torch.testing.assert_close(logits(model), logits_after(expected), atol=5e-5, rtol=1e-4)


def test_vocabulary_without_its_special_tokens(llama, word_tokenizer, chat_tokenizer, tmp_path):
    def drawn(**config):
        torch.manual_seed(0)
        return set(vocabulary_tokens(PrefixExtConfig(num_virtual_tokens=4000, init="vocab", **config), llama).ids)

    whole = set(range(VOCABULARY))
    assert drawn() == whole - {0, 1}  # by the model's config
    assert drawn(tokenizer_name_or_path=word_tokenizer) == whole - {0, 1}
    assert drawn(tokenizer_name_or_path=chat_tokenizer) == whole - {0, 1, 2}
    with pytest.raises(ValueError, match="give `tokenizer_name_or_path`"):
        drawn(tokenizer_name_or_path="no/such")
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no words to draw from: all tokens of the tokenizer are special"):
        drawn(tokenizer_name_or_path=str(tmp_path))


def test_a_longer_adapter_is_cut_and_keys_alone_are_taken(adapters):
    path = list(adapters)[1]
    whole = prefix_kv(adapters[path])
    settings = {"init": "adapter", "init_adapter": path, "num_virtual_tokens": 12}
    for name, tensor in prefix_kv(with_prefix(base(), **settings)).items():
        assert torch.equal(tensor, whole[name][:, :12])
    for name, tensor in prefix_kv(with_prefix(base(), init_adapter_part="keys", init_std=0.5, **settings)).items():
        if name.endswith("key"):
            assert torch.equal(tensor, whole[name][:, :12])
        else:
            assert tensor.std() == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("stock", [PrefixTuningConfig, CartridgeConfig])
def test_starts_from_stock_adapters(stock, llama, tmp_path):
    model = get_peft_model(llama, stock(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    model.save_pretrained(tmp_path)
    ours = with_prefix(tiny_model("llama"), init="adapter", init_adapter=tmp_path, num_virtual_tokens=5)
    assert torch.equal(logits(ours), logits(model))


def test_adapters_that_do_not_fit(adapters, tmp_path):
    path = next(iter(adapters))
    with pytest.raises(ValueError, match="has 30 virtual tokens, too few to initialize `num_virtual_tokens=31`"):
        with_prefix(base(), init="adapter", init_adapter=path, num_virtual_tokens=31)
    with pytest.raises(ValueError, match="was trained on another base model"):
        with_prefix(tiny_model("llama"), init="adapter", init_adapter=path)
    get_peft_model(
        tiny_model("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9)
    ).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="was trained on another base model"):
        with_prefix(base(), init="average", init_adapter=[path, tmp_path / "stock"])
    with pytest.raises(ValueError, match="neither a folder nor a Hub repository"):
        with_prefix(base(), init="adapter", init_adapter=str(tmp_path / "nowhere"))


def test_resuming_needs_no_source(adapters, tmp_path):
    path = next(iter(adapters))
    shutil.copytree(path, tmp_path / "source")
    model = with_prefix(base(), init="adapter", init_adapter=tmp_path / "source", num_virtual_tokens=9)
    model.save_pretrained(tmp_path / "made")
    shutil.rmtree(tmp_path / "source")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "made", is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    assert read_prefix(tmp_path / "made").num_virtual_tokens == 9
