"""The recorded releases of the programs have what the integrations import, override and are called by."""

from __future__ import annotations

import inspect

import pytest

from helpers.other_trainers import PROGRAMS, imports, integration, page_options, recorded
from helpers.release_sources import parameters

RELEASES = [(name, version) for name in PROGRAMS for version in recorded(name)]
releases = pytest.mark.parametrize(("name", "version"), RELEASES, ids=[" ".join(release) for release in RELEASES])


@releases
def test_releases_have_what_is_needed(name: str, version: str) -> None:
    """A failure here after a change to an integration or its page: record the wheels again."""
    release, program = recorded(name)[version], PROGRAMS[name]
    assert release["signatures"].keys() == set(program.functions)
    assert release["names"].keys() == imports(program.package)
    assert release["options"].keys() == page_options()[name]
    assert [each for each, found in {**release["signatures"], **release["names"]}.items() if not found] == []


def public_methods(kind: type) -> list[str]:
    return [name for name, each in vars(kind).items() if inspect.isfunction(each) and not name.startswith("_")]


def overridden() -> dict[str, object]:
    """Returns ours of the recorded functions, by name."""
    with integration("axolotl") as module:
        plugin = module.PrefixExtPlugin
    with integration("ms_swift") as module:
        tuner = module.register()
    return {
        **{f"axolotl.integrations.base:BasePlugin.{name}": vars(plugin)[name] for name in public_methods(plugin)},
        "swift.tuner_plugin.base:Tuner.prepare_model": tuner.prepare_model,
        "swift.tuner_plugin.base:PeftTuner.save_pretrained": tuner.save_pretrained,
    }


@releases
def test_overridden_methods_have_the_expected_arguments(name: str, version: str) -> None:
    signatures = recorded(name)[version]["signatures"]
    ours = {each: method for each, method in overridden().items() if each in signatures}
    assert bool(ours) == (name in ("axolotl", "ms_swift"))
    for each, method in ours.items():
        theirs = parameters(signatures[each])
        names = [argument.arg for argument in theirs.args] + ([theirs.kwarg.arg] if theirs.kwarg else [])
        assert list(inspect.signature(method).parameters) == names, each
