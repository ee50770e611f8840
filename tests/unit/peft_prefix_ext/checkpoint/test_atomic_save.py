"""A save that is killed at any file operation leaves the old adapter or the new one."""

from __future__ import annotations

import json

import pytest

from helpers.scripts import run_script

SAVES = ["retrained", "another", "named", "first", "written", "exported"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    printed = run_script("killed_saves", tmp_path_factory.mktemp("killed"))
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("save", SAVES)
def test_a_killed_save_leaves_the_old_or_the_new_adapter(save, outcomes):
    old, *_, new = found = outcomes[save]
    assert len(found) > 15
    assert len(new) == 3
    assert old != new
    if save in ("first", "exported"):
        assert all(other[0].startswith("No ") for other in found if other != new)
    else:
        assert all(other in (old, new) for other in found)
