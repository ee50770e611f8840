"""The wheel, alone in an environment with the newest releases that pip finds: what a user gets today.

`make test-wheel` makes the environment. Each step is a process of its own, as a user's would be.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from importlib.metadata import distribution, requires
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

import peft_prefix_ext
from helpers.code_blocks import CLI, LOCAL, block, run
from peft_prefix_ext.tuner import tested_versions

ADAPTER = "restaurant"
WITH_PROGRESS = ("train", "evaluate")  # whose bars are on stderr
# Programs that take the path of any adapter, without a word of this package, by who is asked to load it.
PROGRAMS = {
    "PeftModel": (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({LOCAL!r}), {ADAPTER!r})"
    ),
    "AutoPeftModel": f"from peft import AutoPeftModelForCausalLM as Auto\nAuto.from_pretrained({ADAPTER!r})",
    "load_adapter": (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({LOCAL!r}).load_adapter({ADAPTER!r})"
    ),
    "AutoModel": f"from transformers import AutoModelForCausalLM as Auto\nAuto.from_pretrained({ADAPTER!r})",
    "pipeline": (
        "from transformers import AutoTokenizer, pipeline\n"
        f"write = pipeline('text-generation', {ADAPTER!r}, tokenizer=AutoTokenizer.from_pretrained({LOCAL!r}))\n"
        "assert write('name: Aromi', max_new_tokens=2)"
    ),
}
# Loads what PEFT and they import, but not PEFT, and forks for each of them: as good as a fresh process, at a tenth of the cost.
FORKS = f"""
import os, sys
import accelerate, transformers.masking_utils
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline
assert "peft" not in sys.modules
for name, program in {PROGRAMS!r}.items():
    if os.fork() == 0:
        try:
            exec(program)
        except KeyError as error:
            print(f"{{name}}: KeyError: {{error}}", flush=True)
        else:
            print(f"{{name}}: loaded", flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
# Imports every module while the packages of the extra `train` cannot be found. PEFT itself asks for accelerate.
ALONE = """
import pkgutil, sys
from importlib import import_module
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] in {hidden!r} else find(name, *rest)
)
import peft_prefix_ext

for module in pkgutil.walk_packages(peft_prefix_ext.__path__, "peft_prefix_ext."):
    if not module.name.endswith("__main__") and not module.name.startswith(
        ("peft_prefix_ext.training.", "peft_prefix_ext.trl", "peft_prefix_ext.integrations.")
    ):
        import_module(module.name)
"""


def command(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def ask(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


def test_it_is_the_wheel_and_it_is_alone() -> None:
    assert Path(peft_prefix_ext.__file__).is_relative_to(sys.prefix)
    assert find_spec("vllm") is None
    assert {requirement.name for requirement in tested_versions.tested_requirements()} >= {
        "torch",
        "transformers",
        "peft",
    }
    files = {str(file) for file in distribution("peft-prefix-ext").files or []}
    assert {"peft_prefix_ext/py.typed", "vllm_plugin/py.typed", "vllm_plugin/prefix_serve.py"} <= files
    assert any(file.endswith("LICENSE") for file in files)


def test_no_module_of_the_training_half_needs_more_than_it_asks_for() -> None:
    """Without the extra `train`, all but the rooms that it is for."""
    asked = [Requirement(text) for text in requires("peft-prefix-ext") or []]
    base = {each.name for each in asked if each.marker is None}
    extra = {each.name.replace("-", "_") for each in asked if "train" in str(each.marker) and each.name not in base}
    assert {"trl", "datasets"} <= extra
    done = ask(sys.executable, "-c", ALONE.format(hidden=extra - {"accelerate"}), folder=Path.cwd())
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_readmes_first_command_and_its_code_train(folder: Path) -> None:
    run(block("python", "get_peft_model"), folder)
    for name in (ADAPTER, f"{ADAPTER}-by-hand"):
        config = json.loads((folder / name / "adapter_config.json").read_text())
        assert (config["peft_type"], config["base_model_name_or_path"]) == ("PREFIX_EXT", str(folder / "base"))


def test_what_nobody_told_of_the_type_ends_as_the_docs_say_and_is_mended_as_they_say(folder: Path) -> None:
    (folder / "programs.py").write_text(FORKS)
    alone = ask(sys.executable, "programs.py", folder=folder)
    assert alone.stdout.splitlines() == [f"{name}: KeyError: 'PREFIX_EXT'" for name in PROGRAMS], alone.stderr[-3000:]
    mended = ask(command("prefix-ext"), "run", "programs.py", folder=folder)
    assert mended.stdout.splitlines() == [f"{name}: loaded" for name in PROGRAMS], mended.stderr[-3000:]


def test_going_on_with_training(folder: Path) -> None:
    run(
        "import peft_prefix_ext, torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({LOCAL!r})\n"
        f"model = PeftModel.from_pretrained(base, {ADAPTER!r}, is_trainable=True)\n"
        "ids = torch.arange(2, 12)[None]\nbefore = model(input_ids=ids, labels=ids).loss\nbefore.backward()\n"
        "torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()\n"
        "assert model(input_ids=ids, labels=ids).loss < before\n"
        "model.eval().generate(ids, max_new_tokens=3)\nmodel.save_pretrained('more')\n",
        folder,
    )


def test_the_readmes_commands(folder: Path) -> None:
    for line in block("bash", "prefix-ext verify", CLI).splitlines():
        program, *words = shlex.split(line)
        done = ask(command(program), *words, folder=folder)
        assert done.returncode == 0, (line, done.stderr[-3000:])
        if words[0] not in WITH_PROGRESS:
            assert done.stderr == "", line
    assert ask(command("prefix-ext"), "--version", folder=folder).stdout.startswith("prefix-ext ")
