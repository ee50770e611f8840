"""Recorded sources, and the files of their names."""

from __future__ import annotations

import hashlib

import pytest

from peft_prefix_ext.checkpoint.context import changed_sources, text_hash


def test_a_hash_is_that_of_the_text_in_utf_8():
    assert text_hash("Café") == hashlib.sha256("Café".encode()).hexdigest()


def test_only_files_with_another_text_have_changed(tmp_path):
    names = {name: str(tmp_path / name) for name in ("same", "lines", "other", "binary", "folder", "gone")}
    (tmp_path / "same").write_text("Café", encoding="utf-8")
    (tmp_path / "lines").write_bytes(b"one\r\ntwo")
    (tmp_path / "other").write_text("Tea")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "folder").mkdir()
    recorded = {path: text_hash("one\ntwo" if name == "lines" else "Café") for name, path in names.items()}
    no_files = {"messages": "0" * 64, "x" * 5000: "0" * 64, "a\0b": "0" * 64, "": "0" * 64}
    assert changed_sources({"sources": {**recorded, **no_files}}) == [names["other"], names["binary"]]


@pytest.mark.parametrize("context", [{}, {"sources": None}, {"sources": ["a"]}])
def test_nothing_recorded_has_not_changed(context):
    assert changed_sources(context) == []
