"""The wheel and the sdist as archives: what is in them, what a registry shows, and that both install."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tarfile
from email.message import Message
from importlib.metadata import distribution
from pathlib import Path

import pytest

import peft_prefix_ext
from helpers.distributions import ROOT, archive, call, install

PREFIX_EXT = Path(sys.executable).with_name("prefix-ext")
HELP_SECONDS = 0.5
# What only developers need, and what setuptools writes.
LEFT_OUT = {".ci/run", ".gitignore"}
WRITTEN = {"PKG-INFO", "setup.cfg"}


@pytest.fixture(scope="module")
def metadata() -> Message:
    return distribution("peft-prefix-ext").metadata  # type: ignore[return-value]


def test_the_version_is_the_packages(metadata: Message) -> None:
    assert metadata["Version"] == peft_prefix_ext.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\d\S*)", changelog, re.MULTILINE).group(1) == metadata["Version"]  # type: ignore[union-attr]


def test_a_registry_shows_whose_it_is_and_what_it_is_for(metadata: Message) -> None:
    assert metadata["Author"] == "peft-prefix-ext contributors"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    labels = {url.partition(",")[0] for url in metadata.get_all("Project-URL", [])}
    assert labels == {"Homepage", "Repository", "Documentation", "Changelog", "Issues"}
    classifiers = metadata.get_all("Classifier", [])
    for minor in (11, 12, 13, 14):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers


def test_images_and_links_lead_somewhere_from_a_registry(metadata: Message) -> None:
    readme = str(metadata.get_payload())
    without_code = re.sub(r"```.*?```|`[^`\n]*`", "", readme, flags=re.DOTALL)
    images = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", without_code) + re.findall(r'\bsrc(?:set)?="([^"\s]+)', without_code)
    links = re.findall(r"\]\(([^)\s]+)", without_code) + re.findall(r'\bhref="([^"\s]+)', without_code)
    assert images
    for address in images:
        assert address.startswith("https://"), address
        path = re.match(r"https://raw.githubusercontent.com/peft-prefix-ext/peft-prefix-ext/main/(.+)", address)
        assert path is None or (ROOT / path.group(1)).exists(), address
    assert [address for address in links if not re.match(r"https?://|#|mailto:", address)] == []


def test_the_sdist_holds_what_is_tracked_and_nothing_else() -> None:
    with tarfile.open(archive(".tar.gz")) as sdist:
        files = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    files = {file for file in files if ".egg-info/" not in file}
    tracked = set(call("git", "ls-files", folder=ROOT).splitlines())
    assert files - WRITTEN == tracked - LEFT_OUT


def test_the_sdist_installs_to_the_same_files(tmp_path: Path) -> None:
    beside = Path(sys.prefix)
    commands = install(archive(".tar.gz"), tmp_path / "environment", beside)
    (site,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    for package in ("peft_prefix_ext", "vllm_plugin"):
        installed = {path.relative_to(site): path.read_bytes() for path in (site / package).rglob("*.py")}
        wheel = Path(peft_prefix_ext.__file__).parents[1]
        assert installed == {path.relative_to(wheel): path.read_bytes() for path in (wheel / package).rglob("*.py")}
    assert call(commands / "prefix-ext", "--version").split() == ["prefix-ext", peft_prefix_ext.__version__]


def test_help_is_cheap() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([PREFIX_EXT, "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # The first one compiles; of the others the one that was least disturbed.
    assert min([seconds() for _ in range(4)][1:]) < HELP_SECONDS


def test_help_imports_no_library_of_models() -> None:
    program = (
        "import sys\nfrom peft_prefix_ext.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'peft', 'numpy'} & sys.modules.keys()"
    )
    assert call(sys.executable, "-c", program).startswith("usage: prefix-ext")
