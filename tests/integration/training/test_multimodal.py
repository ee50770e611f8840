"""Models that read images or audio: before text and before media a prefix acts like its text, in all that a model does."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache, PaliGemmaConfig, PaliGemmaForConditionalGeneration

from helpers.multimodal_configs import MULTIMODAL
from helpers.multimodal_inputs import MEDIA
from helpers.prefixed import with_prefix
from helpers.tiny_multimodal import media, positions, prompts, tiny_multimodal, words

TEXT = [1, 5, 17, 40, 23, 9, 64, 30]
OTHER_TEXT = [1, 6, 18, 41, 24, 10, 65, 31]
P = len(TEXT)
EXACT = 1e-5  # relative
PADDING = 3
NEW_TOKENS = 6
# Reentrant checkpointing loses the gradient of K/V that layers share.
SHARE_KV = {"gemma3n", "gemma3n:audio", "gemma4"}

KINDS = ["text", "media"]
FORMS = ["no mask", "mask", "left padding", "left padding and positions"]


class Case:
    """A base model, the same with a prefix that is the text, and what they say of a text and of prompts with media."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.base = tiny_multimodal(name)
        self.ids = {"text": words(2, 15, seed=5), "media": prompts(name)}
        self.logits_after_text = {kind: self.logits(self.base, kind, text=TEXT)[:, P:] for kind in KINDS}
        self.tokens_after_text = self.generate(self.base, text=TEXT)
        # The model has answered a batch by now, of which it must not remember anything.
        self.model = with_prefix(copy.deepcopy(self.base), num_virtual_tokens=P, init_token_ids=TEXT)

    def inputs(self, kind: str, form: str, text: list[int] | None = None) -> dict[str, torch.Tensor]:
        """Returns the inputs of a model: the text and the ids of this kind, behind padding if the form has any."""
        num_padding = PADDING if "padding" in form else 0
        before = [0] * num_padding + (text or [])
        ids = torch.cat([torch.tensor([before] * 2, dtype=torch.long).view(2, -1), self.ids[kind]], dim=1)
        mask = (torch.arange(ids.shape[1]) >= num_padding).long().expand(2, -1)
        inputs = {"input_ids": ids, **(media(self.name, ids) if kind == "media" else {})}
        if form != "no mask":
            inputs["attention_mask"] = mask
        if form == "left padding and positions":
            inputs["position_ids"] = positions(self.base, inputs)
        return inputs

    @torch.no_grad()
    def logits(self, model, kind: str, form: str = "mask", text: list[int] | None = None) -> torch.Tensor:
        return model(**self.inputs(kind, form, text)).logits

    def generate(self, model, form: str = "mask", text: list[int] | None = None, **options) -> torch.Tensor:
        inputs = self.inputs("media", form, text)
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
        return tokens[:, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="module", params=list(MULTIMODAL))
def case(request):
    with runs_in_this_release(request.param):
        return Case(request.param)


@contextmanager
def runs_in_this_release(name):
    """Skips where the base model fails: transformers 5.24.0 asks Llama 4's decoder for an output that it has not."""
    try:
        yield
    except AttributeError as error:
        if name != "llama4" or "image_outputs" not in str(error):
            raise
        with pytest.raises(ValueError, match="image_outputs"):
            with_prefix(tiny_multimodal(name))
        pytest.skip("the base model does not run in this release of transformers")


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_of_text_is_the_text(case, kind, form):
    logits = case.logits(case.model, kind, form)[:, -case.ids[kind].shape[1] :]
    assert difference(logits, case.logits_after_text[kind]) < EXACT


def test_text_and_media_matter(case):
    """Without these the other tests could not fail."""
    expected = case.logits_after_text["media"]
    assert difference(case.logits(case.base, "media", text=OTHER_TEXT)[:, P:], expected) > 0.1
    assert not torch.equal(case.generate(case.base, text=OTHER_TEXT), case.tokens_after_text)
    assert difference(case.logits(case.base, "media"), expected) > 0.1
    inputs = case.inputs("media", "mask")
    for value in inputs.values():
        if value.is_floating_point():
            value.neg_()
    with torch.no_grad():
        assert difference(case.model(**inputs).logits, expected) > 0.1


@pytest.mark.parametrize("form", ["no mask", "mask", "left padding"])
def test_generates_what_the_base_model_does_after_the_text(case, form):
    assert torch.equal(case.generate(case.model, form), case.tokens_after_text)


def test_beams_are_those_after_the_text(case):
    beams = {"num_beams": 3, "num_return_sequences": 2}
    try:
        expected = case.generate(case.base, text=TEXT, **beams)
    except ValueError as error:
        if case.name != "llama4" or "do not match" not in str(error):
            raise
        return  # it has the images for one beam of each row alone
    assert torch.equal(case.generate(case.model, **beams), expected)


def test_saves_and_loads(case, tmp_path):
    case.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(case.base), tmp_path).eval()
    assert torch.equal(case.logits(loaded, "media"), case.logits(case.model, "media"))


def test_both_kinds_of_checkpointing_give_the_gradient(case):
    model = with_prefix(copy.deepcopy(case.base), num_virtual_tokens=P, init_token_ids=TEXT, reparam="mlp").train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)  # the last layer of the MLP starts at zero, and passes no gradient on
    inputs = case.inputs("media", "mask")

    def gradient():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])

    expected = gradient()
    assert expected.norm() > 1e-3
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        if use_reentrant and case.name in SHARE_KV:
            with pytest.raises(ValueError, match="loses the gradient of K/V that layers share"):
                gradient()
        else:
            assert difference(gradient(), expected) < EXACT


# What stands for all: plain positions, windows with images that see themselves as a whole, chunks, three axes.
IN_THE_PREFIX = ["llava", "gemma3", "llama4", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize(
    "name",
    [name if name in IN_THE_PREFIX else pytest.param(name, marks=pytest.mark.soak) for name in MULTIMODAL],
)
@torch.no_grad()
def test_media_in_the_prefix(name):
    """The cache of a prompt with media is a prefix, before text and before other media."""
    base, ids = tiny_multimodal(name), prompts(name)
    first, second = ({key: value.chunk(2)[row] for key, value in media(name, ids).items()} for row in range(2))
    both = {key: torch.cat([first[key], second[key]], dim=1 if "token_type" in key else 0) for key in first}
    with runs_in_this_release(name):
        expected = base(input_ids=ids.view(1, -1), **both).logits[:, ids.shape[1] :]
    # What has left a window stays in a cache without a config, which has no place for recurrent states.
    cache = DynamicCache(config=base.config) if name == "qwen3_5" else DynamicCache()
    base(input_ids=ids[:1], past_key_values=cache, **first)
    num_tokens, deltas = ids.shape[1], getattr(base.base_model, "rope_deltas", None)
    options = {"num_virtual_tokens": num_tokens, "init_kv": cache}
    if deltas is None:
        model = with_prefix(base, **options)
    else:
        # As the documentation says.
        model = with_prefix(copy.deepcopy(base), **options, init_kv_next_position=num_tokens + int(deltas))
        unknown = rf"fewer positions than tokens.* `init_kv_next_position`.* text alone: {num_tokens}, "
        with pytest.raises(ValueError, match=unknown):
            with_prefix(copy.deepcopy(base), **options)
        elsewhere = with_prefix(base, **options, init_kv_next_position=num_tokens)
        assert difference(elsewhere(input_ids=ids[1:], **second).logits, expected) > 0.01
    assert difference(model(input_ids=ids[1:], **second).logits, expected) < EXACT


@pytest.mark.parametrize("name", ["llava", "qwen2_audio"])
def test_what_stands_for_media_is_refused_in_a_text(name):
    with pytest.raises(ValueError, match=r"init='tokens'` starts from has a placeholder .*\(token 100\)"):
        with_prefix(tiny_multimodal(name), init_token_ids=[5, MEDIA, 6])


@torch.no_grad()
def test_windows_go_by_tokens_and_not_by_the_positions_of_images():
    """On the axis of time all tokens of an image have one position, so that a prefix would leave the window too late."""
    sliding = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 0}
    base, ids = tiny_multimodal("qwen2_vl", **sliding), prompts("qwen2_vl")
    assert "sliding_attention" in base.config.text_config.layer_types
    after_text = torch.cat([torch.tensor([TEXT] * 2), ids], dim=1)
    expected = base(input_ids=after_text, **media("qwen2_vl", after_text)).logits[:, P:]
    model = with_prefix(base, num_virtual_tokens=P, init_token_ids=TEXT)
    assert difference(model(input_ids=ids, **media("qwen2_vl", ids)).logits, expected) < EXACT


def test_a_model_that_sees_its_prompt_at_once_is_refused():
    """PaliGemma."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", "vocab_size": 128, "num_key_value_heads": 1, "head_dim": 16, **sizes},
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, **sizes},
        image_token_index=MEDIA,
        projection_dim=32,
    )
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"PaliGemmaForConditionalGeneration .* is not causal"):
        with_prefix(PaliGemmaForConditionalGeneration(config))
