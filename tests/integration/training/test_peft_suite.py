"""PEFT's own tests of decoders and encoder-decoders, from its sdist, pass with `PrefixExtConfig`."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

from helpers.scripts import TESTS


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the tests of the installed release of PEFT, as a package `peft_tests`."""
    folder = tmp_path_factory.mktemp("suite")
    wanted = ["--no-deps", "--no-binary", "peft", f"peft=={version('peft')}"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, *wanted], check=True)
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as sdist:
        sdist.extractall(folder, filter="data")
    (unpacked,) = folder.glob("peft-*/tests")
    unpacked.rename(folder / "peft_tests")
    (folder / "peft_tests" / "__init__.py").touch()
    return folder


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tests", ["test_decoder_models", "test_encoder_decoder_models"])
def test_a_prefix_passes_the_tests_of_peft(tests: str, suite: Path) -> None:
    """What may fail is in `helpers/training/peft_suite/expected.py`, with the reason."""
    path = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "helpers.training.peft_suite.plugin",
            "-c",
            os.devnull,
            "-q",
            "--tb=short",
            f"peft_tests/{tests}.py",
        ],
        cwd=suite,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "HF_HUB_CACHE": str(suite / "hub"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
