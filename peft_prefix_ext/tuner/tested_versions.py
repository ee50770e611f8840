"""The releases of other packages that this one was tested with, and one warning for all others.

They are the extra `tested` in pyproject.toml, so that they can be installed. Dependencies have no upper bounds: most later
releases work, and the self-test decides for each model.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement

DISTRIBUTION = "peft-prefix-ext"
TESTED = "tested"  # the extra


def tested_requirements() -> list[Requirement]:
    """Returns one requirement for each tested package; none if this package is not installed."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from its sources
        return []
    requirements = [Requirement(text) for text in declared]
    return [each for each in requirements if each.marker is not None and each.marker.evaluate({"extra": TESTED})]


def untested(requirements: list[Requirement]) -> list[str]:
    """Returns a phrase for each installed package whose version is out of its range in `requirements`."""
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
    """Warns once in each process if packages are installed in untested versions."""
    if found := untested(tested_requirements()):
        warnings.warn(
            f"{DISTRIBUTION} was not tested with {', '.join(found)}. Whether a prefix works is put to the test on each model "
            f"that it is added to, and that test decides; the extra `{TESTED}` of {DISTRIBUTION} installs tested versions.",
            stacklevel=3,
        )
