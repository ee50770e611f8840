"""When the caches of other connectors are emptied after a failed load."""

from __future__ import annotations

from types import SimpleNamespace

from vllm_plugin.scheduler.other_connectors import OtherConnectors


def test_other_connectors_are_reset_twice_and_never_twice_before_a_step() -> None:
    other_connectors, answers = OtherConnectors(), [None, False, True]
    connector = SimpleNamespace(reset_cache=lambda: answers.pop(0))
    other_connectors.next_step()
    other_connectors.load_failed([connector])
    other_connectors.update()
    assert answers == [False, True]
    other_connectors.next_step()
    other_connectors.were_reset()
    other_connectors.update()
    assert answers == [False, True]
    # A connector that refuses is asked once more, and then no more.
    for left in ([True], [], []):
        other_connectors.next_step()
        other_connectors.update()
        assert answers == left
