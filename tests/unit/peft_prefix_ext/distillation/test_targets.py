"""Targets on disk: whole lines only, whatever happens to the process that writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_prefix_ext.distillation.targets import Target, append_targets, read_targets

MESSAGES = [{"role": "user", "content": "Où est Aromi ?\n\U0001f35d"}]


def target(number, reference=None, length=2):
    ids = list(range(length))
    return Target(number, MESSAGES, reference, [1, 2], ids, [[each, 7] for each in ids], [[-0.25, -1.5]] * length)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "targets.jsonl"
    assert read_targets(path) == []
    targets = [target(0), target(2, "Aromi."), target(1, length=0)]
    append_targets(path, targets[:2])
    append_targets(path, targets[2:])
    assert read_targets(path) == targets
    assert [each.is_used for each in targets] == [True, True, False]
    assert targets[1].question.reference == "Aromi."


@given(cut=st.integers(0, 400))
def test_a_killed_run_loses_its_last_line_at_most(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("targets") / "targets.jsonl"
    append_targets(path, [target(0), target(1), target(2)])
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    cut = min(cut, len(whole))
    path.write_bytes(whole[:cut])
    kept = sum(end <= cut for end in ends)
    # A line that lacks nothing but its end is a line.
    found = read_targets(path)
    assert found[:kept] == [target(number) for number in range(kept)]
    assert len(found) - kept in (0, 1)
    append_targets(path, [target(number) for number in range(len(found), 3)])
    assert read_targets(path) == [target(0), target(1), target(2)]


def test_a_line_in_the_middle_is_not_skipped(tmp_path):
    path = tmp_path / "targets.jsonl"
    append_targets(path, [target(0)])
    path.write_text("{\n" + path.read_text())
    with pytest.raises(ValueError, match=r"targets.jsonl, line 1 is no target; remove that line"):
        read_targets(path)
