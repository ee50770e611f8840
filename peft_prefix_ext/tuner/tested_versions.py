"""Which releases of other packages this one was tested with, and one warning beyond them.

They are the extra `tested` in pyproject.toml, so that who wants one of these can have it installed. No dependency has an
upper bound: a release that comes later mostly works, and a prefix is put to the test on each model that it is added to.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement

DISTRIBUTION = "peft-prefix-ext"
TESTED = "tested"  # the extra


def tested_requirements() -> list[Requirement]:
    """Returns what was tested, one requirement for each package; none if this package is not installed."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from its sources
        return []
    requirements = [Requirement(text) for text in declared]
    return [each for each in requirements if each.marker is not None and each.marker.evaluate({"extra": TESTED})]


def untested(requirements: list[Requirement]) -> list[str]:
    """Returns a few words for each installed package whose version none of `requirements` has in its range."""
    found = []
    for requirement in requirements:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version} (tested: {requirement.specifier})")
    return found


@cache
def warn_of_untested_versions() -> None:
    """Warns, once in a process, of packages in versions that no test has seen."""
    if found := untested(tested_requirements()):
        warnings.warn(
            f"{DISTRIBUTION} was not tested with {', '.join(found)}. Whether a prefix works is put to the test on each model "
            f"that it is added to, and that test decides; the extra `{TESTED}` of {DISTRIBUTION} installs versions that were "
            "tested.",
            stacklevel=3,
        )
