"""Tested versions are declared once, in pyproject.toml; other versions warn once."""

from __future__ import annotations

import tomllib
import warnings
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from peft import get_peft_model

from helpers.scripts import ROOT
from helpers.tiny import tiny_model
from peft_prefix_ext import PrefixExtConfig
from peft_prefix_ext.tuner import tested_versions

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TESTED = [Requirement(text) for text in PROJECT["optional-dependencies"]["tested"]]


def test_every_dependency_has_a_tested_range_and_no_upper_bound() -> None:
    required = {each.name: each.specifier for each in map(Requirement, PROJECT["dependencies"])}
    assert required.keys() == {requirement.name for requirement in TESTED}
    for requirement in TESTED:
        assert sorted(bound.operator for bound in requirement.specifier) == ["<", ">="]
        # What is older than what was tested may install, what is newer does.
        (least,) = required[requirement.name]
        assert least.operator == ">="
        assert all(Version(least.version) <= Version(bound.version) for bound in requirement.specifier)


@pytest.mark.parametrize("page", ["README.md", "docs/limits.md"])
def test_the_documentation_says_the_same(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    names = {"torch": "PyTorch", "transformers": "transformers", "peft": "PEFT"}
    for requirement in TESTED:
        if requirement.name in names:
            first, end = (Version(str(bound).lstrip("<>=")) for bound in sorted(requirement.specifier, key=str)[::-1])
            last = f"{first.major}.{end.minor - 1}"
            found = f"{names[requirement.name]} {first.major}.{first.minor}" + (
                f" to {last}" if last != str(first) else ""
            )
            assert found in text


def test_tested_versions_of_the_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [*PROJECT["dependencies"], 'vllm>=0.32; extra == "serve"']
    declared += [f'{text}; extra == "tested"' for text in PROJECT["optional-dependencies"]["tested"]]
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    assert [(each.name, each.specifier) for each in tested_versions.tested_requirements()] == [
        (each.name, each.specifier) for each in TESTED
    ]


def test_no_warning_if_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert tested_versions.tested_requirements() == []


def test_one_warning_names_what_was_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0+cpu", "transformers": "99.1.0.dev0", "peft": "0.99.0"}
    requirements = [Requirement(text) for text in ("torch>=2.13,<2.15", "transformers>=5.19,<5.25", "peft>=0.21,<0.22")]
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: installed.get(name) or real(name))
    monkeypatch.setattr(tested_versions, "tested_requirements", lambda: requirements)
    tested_versions.warn_of_untested_versions.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            get_peft_model(tiny_model("llama"), PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    (message,) = [str(warning.message) for warning in caught if "was not tested" in str(warning.message)]
    assert "transformers 99.1.0.dev0 (tested: <5.25,>=5.19), peft 0.99.0 (tested: <0.22,>=0.21)" in message
    assert "put to the test on each model that it is added to, and that test decides" in message
    assert "torch" not in message


def test_no_warning_within_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested_versions, "tested_requirements", lambda: [Requirement("torch>=2,<99")])
    tested_versions.warn_of_untested_versions.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tested_versions.warn_of_untested_versions()
