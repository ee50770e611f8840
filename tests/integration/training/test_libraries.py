"""Each tested release of transformers and PEFT has all that the training half wraps, overrides, calls and imports."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

from helpers.libraries import HOOKED, PACKAGES, TRAINING, differences, needed, overridden, recorded, wrapped
from helpers.release_sources import Release, imported, parameters
from peft_prefix_ext.injection.layer import MASK_ARGUMENTS

# Releases that must keep working, the ends of the range.
TESTED = {"transformers": ("5.19.0", "5.24.0"), "peft": ("0.21.0", "0.21.2")}
# What transformers calls the cache: since 5.24, before, and in some attention modules.
CACHE_ARGUMENTS = {"cache", "past_key_values", "layer_past"}
# What the wrappers of PEFT's methods look for among the arguments.
WRAPPED = {
    "peft.peft_model:PeftModel.__init__": {"model", "peft_config"},
    "peft.peft_model:PeftModel.from_pretrained": {"model", "model_id", "config"},
    "peft.peft_model:PeftModel.add_adapter": {"peft_config"},
    "peft.peft_model:PeftModel.load_adapter": {"model_id", "adapter_name"},
    "peft.peft_model:PeftModel.save_pretrained": {"save_directory", "is_main_process"},
    "peft.config:PeftConfigMixin.from_json_file": {"path_json_file"},
    "peft.peft_model:PeftModel.create_or_update_model_card": {"output_dir"},
    "transformers.utils.hub:PushToHubMixin._upload_modified_files": {"working_dir", "repo_id"},
}
RELEASES = [(package, version) for package in PACKAGES for version in recorded(package)]
releases = pytest.mark.parametrize(("package", "version"), RELEASES, ids=[" ".join(release) for release in RELEASES])


def names(arguments: Any) -> list[str]:
    return [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]


def all_names(arguments: Any) -> set[str]:
    return {*names(arguments), *(argument.arg for argument in arguments.kwonlyargs)}


@pytest.mark.parametrize("package", PACKAGES)
def test_both_ends_of_the_tested_range_are_recorded(package: str) -> None:
    assert recorded(package).keys() >= set(TESTED[package])


@releases
def test_releases_have_everything_that_is_needed(package: str, version: str) -> None:
    """A failure here after a change to the training half: run libraries.py again."""
    release = recorded(package)[version]
    assert release["signatures"].keys() == needed(package)
    assert release["names"].keys() == imported(TRAINING, package)
    assert [name for name, found in {**release["signatures"], **release["names"]}.items() if not found] == []


@releases
def test_wrapped_methods_have_the_expected_arguments(package: str, version: str) -> None:
    assert wrapped().keys() == WRAPPED.keys()
    for name in WRAPPED.keys() & needed(package):
        assert WRAPPED[name] <= all_names(parameters(recorded(package)[version]["signatures"][name])), name


@releases
def test_overridden_methods_have_the_expected_arguments(package: str, version: str) -> None:
    ours = {name: method for name, method in overridden().items() if name in needed(package)}
    for name, method in ours.items():
        theirs = parameters(recorded(package)[version]["signatures"][name])
        signature = inspect.signature(getattr(method, "__func__", method)).parameters
        kinds = {each.kind for each in signature.values()}
        if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
            continue
        is_static = names(theirs)[:1] not in (["self"], ["cls"])  # there, and none with us
        assert list(signature)[is_static : is_static + len(names(theirs))] == names(theirs), name
        assert not theirs.kwonlyargs


@pytest.mark.parametrize("version", recorded("transformers"))
def test_hooks_find_the_cache_and_the_mask(version: str) -> None:
    for name in HOOKED:
        arguments = all_names(parameters(recorded("transformers")[version]["signatures"][name]))
        assert len(arguments & CACHE_ARGUMENTS) == 1, name
        assert arguments & set(MASK_ARGUMENTS), name


@pytest.mark.parametrize("library", [transformers, peft], ids=PACKAGES)
def test_the_installed_releases_are_as_recorded(library: Any) -> None:
    """Of a release that is not recorded: what it changed since the last one that is."""
    release = Release(library.__name__, Path(library.__file__).parents[1])
    assert library.__version__.startswith(release.version)
    assert differences(release) == []
