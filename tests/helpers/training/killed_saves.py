"""Kills saves at each of their file operations; launched by `test_atomic_save.py`.

    python killed_saves.py FOLDER

Prints, for each of `SAVES` and for each place where it was killed, what was found in the folder afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixCheckpointError, read_prefix
from peft_prefix_ext.checkpoint.writer import write_adapter
from peft_prefix_ext.conversion.stock_peft import export_to_peft

FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.")
IDS = random_ids(1, 5)


def killed_at(number: int, save: Callable[[], None]) -> bool:
    """Runs `save` in a process that kills itself at this file event; whether it came to that."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1] == signal.SIGKILL
    seen = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal seen
        if event.startswith(FILE_EVENTS):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    save()
    os._exit(0)


@torch.no_grad()
def found(folder: Path, base: torch.nn.Module) -> list:
    """The adapter that is there: its length and digest to readers, and what PEFT makes of it."""
    try:
        prefix = read_prefix(folder)
    except PrefixCheckpointError as error:
        return [str(error)]
    model = PeftModel.from_pretrained(base, folder)
    logits = model(input_ids=IDS).logits.sum().item()
    if prefix.peft_type == "PREFIX_EXT":
        model.unload()
    return [prefix.num_virtual_tokens, prefix.digest, logits]


def main(folder: Path) -> None:
    base = tiny_model("llama")
    models = {
        "old": with_prefix(tiny_model("llama")),
        "retrained": with_prefix(tiny_model("llama"), seed=2),
        "another": with_prefix(tiny_model("llama"), seed=3, num_virtual_tokens=5, reparam="mlp"),
        "named": with_prefix(tiny_model("llama"), seed=4, num_virtual_tokens=3, adapter_name="task"),
    }
    old = folder / "old"
    models["old"].save_pretrained(old)
    with_prefix(tiny_model("llama"), seed=5, adapter_name="task").save_pretrained(old)
    written = read_prefix(old)
    tensors = {
        f"base_model.model.{written.modules[i]}.prefix_ext.prefix_ext_{kind}": 2 * tensor[:, :2]
        for i, layer in written.layers.items()
        for kind, tensor in layer._asdict().items()
    }
    rows = [{**row, "key_shape": [2, 2, 16], "value_shape": [2, 2, 16]} for row in written.config["prefix_layers"]]
    shorter = {**written.config, "num_virtual_tokens": 2, "prefix_layers": rows}
    place = folder / "place"
    saves = {
        "retrained": ("", old, lambda: models["retrained"].save_pretrained(place)),
        "another": ("", old, lambda: models["another"].save_pretrained(place)),
        "named": ("task", old, lambda: models["named"].save_pretrained(place)),
        "first": ("", None, lambda: models["another"].save_pretrained(place)),
        "written": ("", old, lambda: write_adapter(place, shorter, tensors)),
        "exported": ("", None, lambda: export_to_peft(old, place)),
    }
    outcomes = {}
    for name, (adapter, before, save) in saves.items():
        outcomes[name] = []
        number = 0
        was_killed = True
        while was_killed:
            number += 1
            shutil.rmtree(place, ignore_errors=True)
            if before is not None:
                shutil.copytree(before, place)
            was_killed = killed_at(number, save)
            outcomes[name].append(found(place / adapter, base))
            # Whatever a killed save left, the next one is as good as ever.
            if was_killed and number % 5 == 0:
                save()
                outcomes[name].append(found(place / adapter, base))
                assert not list(place.glob(".adapter*")), list(place.iterdir())
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
