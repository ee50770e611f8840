from __future__ import annotations

from peft_prefix_ext.training.checkpoints import last_whole_checkpoint


def test_a_checkpoint_that_was_not_finished_is_left_out(tmp_path):
    assert last_whole_checkpoint(tmp_path / "none") is None
    for step, state in ((4, "{}"), (8, "{}"), (12, '{"epoch": '), (16, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8"]
