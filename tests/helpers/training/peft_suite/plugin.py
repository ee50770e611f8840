"""A pytest plugin under which PEFT's own tests of decoders and encoder-decoders run with `PrefixExtConfig`.

PEFT lists the methods that its tests are run with: ours takes the place of that list. The tiny models that they load from
the Hub are others here, of the same architectures and under the same names, in a Hub cache of their own.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from helpers.tiny import tiny_model
from helpers.tiny_seq2seq import tiny_encoder_decoder
from helpers.training.peft_suite.expected import reason_of
from peft_prefix_ext import PrefixExtConfig

DECODERS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": "opt",
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": "gpt2",
    "peft-internal-testing/tiny-random-GPTJForCausalLM": "gptj",
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "llama",
    "peft-internal-testing/tiny-dummy-qwen2": "qwen2",
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "gemma3",
}
ENCODER_DECODERS = {
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": "t5",
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": "bart",
}
FORMS = ({"num_virtual_tokens": 10}, {"num_virtual_tokens": 10, "reparam": "none"})


def write_models(hub_cache: Path) -> None:
    """Writes the models into a Hub cache, as a download would."""
    for name, kind in DECODERS.items():
        _write(tiny_model(kind, attention="eager"), name, hub_cache)
    for name, kind in ENCODER_DECODERS.items():
        _write(tiny_encoder_decoder(kind), name, hub_cache)


def _write(model: PreTrainedModel, name: str, hub_cache: Path) -> None:
    folder, revision = hub_cache / f"models--{name.replace('/', '--')}", "0" * 40
    model.save_pretrained(folder / "snapshots" / revision)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(revision, encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    write_models(Path(os.environ["HF_HUB_CACHE"]))
    try:
        import diffusers
    except ImportError:
        # Only asked whether a model is one of its pipelines.
        diffusers = types.ModuleType("diffusers")
        diffusers.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = diffusers


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module: Any = metafunc.module
    is_decoder = module.__name__.endswith("test_decoder_models")
    task_type = "CAUSAL_LM" if is_decoder else "SEQ_2_SEQ_LM"
    # The marks of the tests hold this very list.
    module.ALL_CONFIGS[:] = [(PrefixExtConfig, {"task_type": task_type, **form}) for form in FORMS]
    # Where PEFT lists the methods that have no `init_weights`, since they change the output from the first step, as ours does.
    module.set_init_weights_false = lambda config_cls, kwargs: dict(kwargs)
    # PEFT goes online once for each model, and ever after not.
    hub = sys.modules[f"{module.__package__}.testing_utils"]
    hub._HUB_MODEL_ACCESSES.update(dict.fromkeys([*DECODERS, *ENCODER_DECODERS], 1))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours: list[Any] = []
    others: list[pytest.Item] = []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        (ours if parameters.get("config_cls") is PrefixExtConfig else others).append(item)
    for test in ours:
        if reason := reason_of(test):
            test.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    items[:] = ours
    config.hook.pytest_deselected(items=others)
