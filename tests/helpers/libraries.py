"""What the training half needs of transformers and PEFT, as found in each tested release.

    PYTHONPATH=tests python -m helpers.libraries transformers|peft WHEEL_OR_FOLDER ...

records the releases given, each a wheel or a folder with the package in it, which need not run here, and says what each
changed. Do so when the training half needs something else of them, or when there is a new release.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import wrapt
from peft import PeftModel
from peft.config import PeftConfigMixin

import peft_prefix_ext
from helpers.release_sources import Release, changes, imported, order, record

RECORDED = Path(__file__).with_name("recorded")
PACKAGES = ("transformers", "peft")
TRAINING = Path(peft_prefix_ext.__file__).parent
# What runs a command, or is imported by a program that is not installed: see `other_trainers.py`.
NOT_IMPORTED = {
    "peft_prefix_ext.__main__",
    "peft_prefix_ext.integrations.axolotl",
    "peft_prefix_ext.integrations.ms_swift",
}
# What is called on objects that the libraries hand over, or in the manner of what ours takes the place of.
_CALLED = {
    "transformers.cache_utils": [
        "Cache.get_mask_sizes",
        "Cache.get_seq_length",
        "Cache.is_compileable",
        "Cache.update",
        "DynamicCache.__init__",
        "EncoderDecoderCache.__init__",
    ],
    "transformers.integrations.sdpa_attention": ["sdpa_attention_forward"],
    "transformers.masking_utils": ["create_causal_mask", "create_sliding_window_causal_mask"],
    "transformers.utils.generic": ["GeneralInterface.register"],
    "transformers.configuration_utils": ["PreTrainedConfig.get_text_config"],
    "transformers.tokenization_utils_base": ["PreTrainedTokenizerBase.apply_chat_template"],
    "transformers.modeling_utils": [
        "EmbeddingAccessMixin.get_input_embeddings",
        "PreTrainedModel.gradient_checkpointing_enable",
    ],
    # They call ours.
    "transformers.integrations.peft": ["PeftAdapterMixin.add_adapter", "PeftAdapterMixin.load_adapter"],
    "peft.config": ["PeftConfigMixin.from_pretrained", "PeftConfigMixin.save_pretrained"],
    "peft.mapping_func": ["get_peft_model"],
    "peft.peft_model": [
        "PeftModel._split_kwargs",
        "PeftModel.from_pretrained",
        "PeftModel.get_base_model",
        "PeftModel.save_pretrained",
    ],
    "peft.tuners.tuners_utils": [
        "BaseTuner.__init__",
        "BaseTuner._mark_only_adapters_as_trainable",
        "BaseTunerLayer.active_adapters",
        "BaseTunerLayer.enable_adapters",
    ],
    "peft.utils.other": [
        "ModulesToSaveWrapper.delete_adapter",
        "ModulesToSaveWrapper.unload_and_optionally_merge_module",
        "TrainableTokensWrapper.delete_adapter",
        "TrainableTokensWrapper.unload_and_optionally_merge_module",
    ],
    "peft.utils.peft_types": ["register_peft_method"],
    "peft.utils.save_and_load": ["get_peft_model_state_dict", "set_peft_model_state_dict"],
}
# Modules whose forward the hooks of a prefix change the arguments of: those of the attention and of the decoder.
HOOKED = {
    f"transformers.models.{family}.modeling_{family}:{name}.forward"
    for family, names in {
        "bart": ["BartAttention", "BartDecoder"],
        "bloom": ["BloomAttention", "BloomModel"],
        "falcon": ["FalconAttention", "FalconModel"],
        "gemma3": ["Gemma3Attention", "Gemma3TextModel"],
        "gpt2": ["GPT2Attention", "GPT2Model"],
        "llama": ["LlamaAttention", "LlamaModel"],
        "llama4": ["Llama4TextAttention", "Llama4TextModel"],
        "mpt": ["MptAttention", "MptModel"],
        "opt": ["OPTAttention", "OPTDecoder"],
        "qwen3_next": ["Qwen3NextAttention", "Qwen3NextModel"],
        "t5": ["T5LayerSelfAttention", "T5Stack"],
    }.items()
    for name in names
}
CALLED = {f"{module}:{name}" for module, names in _CALLED.items() for name in names}


def classes() -> Iterator[type]:
    """Yields the classes of the training half."""
    for module in pkgutil.walk_packages([str(TRAINING)], "peft_prefix_ext."):
        if module.name not in NOT_IMPORTED:
            found = vars(import_module(module.name)).values()
            yield from (each for each in found if inspect.isclass(each) and each.__module__ == module.name)


def overridden() -> dict[str, Any]:
    """Returns the methods of the libraries that ours override, as `module:Class.method`, each with ours."""
    return {
        f"{base.__module__}:{base.__qualname__}.{name}": method
        for ours in classes()
        for name, method in vars(ours).items()
        if inspect.isfunction(getattr(method, "__func__", method)) and not name.startswith("__")
        for base in [next((base for base in ours.__mro__[1:] if name in vars(base)), object)]
        if base.__module__.split(".")[0] in PACKAGES
    }


def wrapped() -> dict[str, Any]:
    """Returns the methods of PEFT that the training half wraps, as `module:Class.method`, each with its wrapper."""
    import_module("peft_prefix_ext.tuner.model")
    return {
        f"{method.__wrapped__.__module__}:{method.__wrapped__.__qualname__}": method
        for holder in (PeftModel, PeftConfigMixin)
        for method in vars(holder).values()
        if isinstance(method, wrapt.FunctionWrapper)
    }


def needed(package: str) -> set[str]:
    """Lists the functions of a package whose parameters matter."""
    return {name for name in {*overridden(), *wrapped(), *CALLED, *HOOKED} if name.split(".")[0] == package}


def describe(release: Release) -> dict[str, Any]:
    """Returns what a release has of what the training half needs."""
    names = imported(TRAINING, release.package)
    return {
        "signatures": {name: release.signature(name) for name in sorted(needed(release.package))},
        "names": {name: release.has(name) or _is_automatic(release, name) for name in sorted(names)},
    }


def _is_automatic(release: Release, name: str) -> bool:
    """Whether it is one of the classes that transformers imports on use without a list."""
    module, _, wanted = name.partition(":")
    files = ("configuration_auto", "modeling_auto", "tokenization_auto")
    return module == "transformers" and any(release.has(f"transformers.models.auto.{file}:{wanted}") for file in files)


def recorded(package: str) -> dict[str, Any]:
    """Returns what is recorded of a package, by version."""
    found: dict[str, Any] = json.loads((RECORDED / f"{package}.json").read_text(encoding="utf-8"))
    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def differences(release: Release) -> list[str]:
    """Says in what a release differs from what is recorded of it, or of the one before where it is new."""
    known = recorded(release.package)
    nearest = max((each for each in known if order(each) <= order(release.version)), key=order, default=min(known))
    return changes(known[nearest], describe(release))


def main(package: str, *places: str) -> None:
    releases = sorted((Release(package, Path(place)) for place in places), key=lambda each: order(each.version))
    record(RECORDED / f"{package}.json", ((release.version, describe(release)) for release in releases))


if __name__ == "__main__":
    main(*sys.argv[1:])
