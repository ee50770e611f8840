"""Files of adapters that change while workers have them, or before they read them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.serving import support
from helpers.serving.worker import CONFIG, Worker, load


def replaced(folder: Path) -> None:
    support.write_adapter(folder, CONFIG, support.random_prefix(CONFIG, 6, seed=99))


def overwritten(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def truncated(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def renumbered(folder: Path) -> None:
    """Swaps the layer indices of the same weights."""
    config = folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields["prefix_layers"][0]["index"], fields["prefix_layers"][1]["index"] = 1, 0
    config.write_text(json.dumps(fields))


def not_a_number(folder: Path) -> None:
    prefix = support.random_prefix(CONFIG, 6)
    prefix[1][1][0, 0, 0] = torch.nan
    support.write_adapter(folder, CONFIG, prefix)


@pytest.mark.parametrize("damage", [shutil.rmtree, replaced, overwritten, renumbered, truncated, not_a_number])
def test_changed_files_fail_only_their_loads(
    adapters: Any, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    (bad, _), (good, good_kv) = adapters("bad"), adapters("good")
    worker = Worker(1 << 20)
    damage(Path(bad.path))
    with caplog.at_level(logging.ERROR, "vllm.prefix_adapters"):
        # All blocks from the first one of the load: those after it are computed from it.
        worker.writer.write([load(bad, [1, 2, 9]), load(good, [3, 4]), load(bad, [5, 6, 7], start=4)])
    assert worker.writer.take_unwritten() == {1, 2, 9, 6, 7}
    assert worker.writer.take_unwritten() == set()
    assert worker.holds(good_kv, [3, 4], 0, 6)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("Prefix adapter 'bad'") or "of prefix adapter 'bad'" in message or "in bad" in message
    assert message.endswith("Its requests fail.")


def test_resident_prefixes_survive_changes_of_their_file(adapters: Any) -> None:
    spec, kv = adapters("one")
    worker = Worker(1 << 20)
    worker.writer.write([load(spec, [1, 2])])
    overwritten(Path(spec.path))
    worker.writer.write([load(spec, [3, 4])])
    assert worker.holds(kv, [3, 4], 0, 6)


@pytest.mark.parametrize("change", [overwritten, truncated, shutil.rmtree])
def test_what_is_served_is_what_was_checked(
    adapters: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    """A file that changes behind the check of its digest; a memory mapping would change with it, or end the process."""
    from vllm_plugin.worker import prefix_manager

    spec, kv = adapters("one")
    original = prefix_manager.reload
    monkeypatch.setattr(prefix_manager, "reload", lambda spec: (original(spec), change(Path(spec.path)))[0])
    worker = Worker(1 << 20)
    worker.writer.write([load(spec, [1, 2])])
    assert worker.holds(kv, [1, 2], 0, 6)


def test_an_unexpected_error_does_not_end_the_engine(adapters: Any, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(1 << 20)
    worker.manager.open = lambda spec: 1 / 0
    worker.writer.write([load(adapters("one")[0], [1, 2])])
    assert worker.writer.take_unwritten() == {1, 2}
    assert "ZeroDivisionError" in caplog.text
