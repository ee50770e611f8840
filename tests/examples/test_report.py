"""The table and the picture."""

import pytest
from report import running_mean, save_losses, table


def test_table_wraps_its_cells():
    lines = table(["input", "base"], [["a long sentence", "short"]], width=8).splitlines()
    assert lines == [
        " input    | base",
        "----------+----------",
        " a long   | short",
        " sentence |",
    ]


def test_running_mean_starts_with_what_there_is():
    assert running_mean([4.0, 2.0, 0.0], window=2) == pytest.approx([4, 3, 1])


def test_save_losses_writes_a_picture(tmp_path):
    save_losses({"describe": [3.0, 2.0], "extract": [1.0, 0.5]}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
