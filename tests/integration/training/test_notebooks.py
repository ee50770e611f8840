"""Notebooks: a session goes on while the package is edited."""

from __future__ import annotations

from helpers.scripts import run_script


def test_autoreload(tmp_path):
    # IPython goes on when a module cannot be reloaded.
    assert "failed" not in run_script("edited_package", tmp_path)
