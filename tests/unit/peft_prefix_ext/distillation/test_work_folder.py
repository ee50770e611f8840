"""The work folder keeps what the stages made, and is not mixed with that of other inputs."""

from __future__ import annotations

import pytest

from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.work_folder import DistillationFolder

INPUTS = {"base": "b", "seed": 0}


def test_what_stages_write_is_there_in_the_next_run(tmp_path):
    folder = DistillationFolder(tmp_path / "work", INPUTS)
    assert folder.questions() is None
    questions = [
        Question([{"role": "user", "content": "\u2028 où?"}], "là"),
        Question([{"role": "user", "content": "a"}]),
    ]
    folder.write_questions(questions)
    student = folder.student({"p": 1}, 0)
    student.mkdir()
    assert folder.result(student) is None
    folder.write_result(student, {"divergence": 0.5})
    with folder.timed("train"):
        pass
    with pytest.raises(RuntimeError, match="killed"), folder.timed("train"):
        raise RuntimeError("killed")
    again = DistillationFolder(tmp_path / "work", dict(INPUTS))
    assert again.questions() == questions
    assert again.student({"p": 1}, 0) == student != again.student({"p": 2}, 0)
    assert again.result(student) == {"divergence": 0.5}
    assert again.seconds()["train"] >= 0


def test_a_folder_of_other_inputs_is_refused(tmp_path):
    DistillationFolder(tmp_path / "work", INPUTS)
    with pytest.raises(ValueError, match=r"made from other inputs \(seed, top_k\): name another folder"):
        DistillationFolder(tmp_path / "work", {"base": "b", "seed": 1, "top_k": 5})
    DistillationFolder(tmp_path / "work", INPUTS)


def test_folders_of_something_else_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="full holds something else: name an empty folder"):
        DistillationFolder(tmp_path / "full", INPUTS)
    with pytest.raises(ValueError, match=r"thesis.txt is a file: name a folder"):
        DistillationFolder(tmp_path / "full" / "thesis.txt", INPUTS)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
