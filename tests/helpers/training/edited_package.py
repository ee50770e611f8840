"""Trains in an IPython session while all of the package is edited, with `%autoreload 2`; launched by `test_notebooks.py`.

    python edited_package.py FOLDER

FOLDER gets a copy of the package, which the session uses.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell

from helpers.scripts import ROOT

NAME = "peft_prefix_ext"

SETUP = """
%load_ext autoreload
%autoreload 2
import torch
from peft import PeftModel, get_peft_model
from helpers.tiny import random_ids, tiny_model
import peft_prefix_ext
from peft_prefix_ext import PrefixExtConfig, read_prefix

ids = random_ids(2, 9)

def config():
    return PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, init_std=0.5)

def train(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    losses = []
    for _ in range(3):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)
"""
BEFORE = """
torch.manual_seed(1)
model = get_peft_model(tiny_model("llama"), config())
losses = train(model)
model.save_pretrained(folder / "before")
logits = model(input_ids=ids).logits
"""
AFTER = """
assert torch.equal(model(input_ids=ids).logits, logits)
model.save_pretrained(folder / "after")
assert (folder / "after" / "README.md").read_text() == (folder / "before" / "README.md").read_text()
assert torch.equal(PeftModel.from_pretrained(tiny_model("llama"), folder / "before")(input_ids=ids).logits, logits)
torch.manual_seed(1)
again = get_peft_model(tiny_model("llama"), config())
assert isinstance(again.base_model, peft_prefix_ext.PrefixExtModel)
assert torch.equal(train(again), losses)
"""
AT_THE_END = "assert train(model)[-1] < losses[-1]"


def run(shell: InteractiveShell, cell: str) -> None:
    shell.run_cell(cell).raise_error()


def main(folder: Path) -> None:
    package = folder / NAME
    shutil.copytree(ROOT / NAME, package, ignore=shutil.ignore_patterns("__pycache__"))
    sys.path.insert(0, str(folder))
    shell = InteractiveShell.instance()
    shell.user_ns["folder"] = folder
    for cell in (SETUP, BEFORE):
        run(shell, cell)
    assert sys.modules[NAME].__file__ == str(package / "__init__.py")
    for _ in range(2):
        names = [name for name in sys.modules if name.split(".")[0] == NAME]
        later = time.time() + 10
        for path in package.rglob("*.py"):
            path.write_text(path.read_text() + "\nEDITED = True\n")
            os.utime(path, (later, later))
        run(shell, AFTER)
        assert [name for name in names if not hasattr(sys.modules[name], "EDITED")] == []
    run(shell, AT_THE_END)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
