"""A save that is killed, at whatever it does with files, leaves the old adapter or the new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torchrun import TESTS

SAVES = ["retrained", "another", "named", "first", "written", "exported"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    script = Path(__file__).with_name("killed_saves.py")
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, str(tmp_path_factory.mktemp("killed"))],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("save", SAVES)
def test_what_is_left_is_the_old_adapter_or_the_new_one(save, outcomes):
    old, *_, new = found = outcomes[save]
    assert len(found) > 15
    assert len(new) == 3
    assert old != new
    if save in ("first", "exported"):
        assert all(other[0].startswith("No ") for other in found if other != new)
    else:
        assert all(other in (old, new) for other in found)
