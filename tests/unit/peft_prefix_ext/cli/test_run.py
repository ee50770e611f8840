"""`prefix-ext run`: programs that never import this package load adapters, and run unchanged otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from helpers.prefixed import with_prefix
from helpers.tiny import tiny_model

Run = Callable[..., "subprocess.CompletedProcess[str]"]

LOADS = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
print(__name__, sys.argv)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
print(model.peft_type.value)
"""
ENDS = "import sys\n\ndef main():\n    print(__name__, sys.argv[1:])\n    sys.exit(int(sys.argv[1]))\n"
FAILS = "raise ValueError('of the program')\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter, and programs of every kind."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model("llama").save_pretrained(folder / "base")
    with_prefix(AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder / "adapter")
    for name, code in {
        "loads.py": LOADS,
        "ends.py": ENDS + "\n\nif __name__ == '__main__':\n    main()\n",
        "fails.py": FAILS,
        "package/__init__.py": "",
        "package/__main__.py": "import sys\nfrom package import beside\nprint(__name__, sys.argv[1:])\n",
        "package/beside.py": "",
        "nothing/__init__.py": "",
        "broken/__init__.py": "import not_there\n",
        "broken/__main__.py": "",
        "bin/of_python": f"#!{sys.executable}\nimport sys\nprint(__name__, sys.argv[1:])\n",
        "bin/of_sh": "#!/bin/sh\necho no\n",
        # A distribution with a command of its own, as pip leaves it in an environment.
        "installed/ends_0.dist-info/METADATA": "Metadata-Version: 2.1\nName: ends\nVersion: 0\n",
        "installed/ends_0.dist-info/entry_points.txt": "[console_scripts]\nends-with = ends:main\n",
        "installed/ends.py": ENDS,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
        path.chmod(0o755)
    return folder


@pytest.fixture
def run(folder: Path) -> Run:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        paths = {
            "PYTHONPATH": os.pathsep.join([str(folder / "installed"), os.environ.get("PYTHONPATH", "")]),
            "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        }
        command = [sys.executable, "-m", "peft_prefix_ext", "run", *words]
        return subprocess.run(command, cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True)

    return run


def test_a_program_that_never_imports_the_package_loads_an_adapter(folder: Path, run: Run) -> None:
    """The error that the model card and the README name, and their remedy."""
    alone = subprocess.run([sys.executable, "loads.py"], cwd=folder, capture_output=True, text=True)
    assert alone.returncode == 1
    assert alone.stderr.splitlines()[-1] == "KeyError: 'PREFIX_EXT'"
    done = run("loads.py", "--adapter", "x")
    assert (done.returncode, done.stdout) == (0, "__main__ ['loads.py', '--adapter', 'x']\nPREFIX_EXT\n"), done.stderr


@pytest.mark.parametrize(
    ("words", "output", "code"),
    [
        (["ends.py", "3", "--help", "-m", "--", "x"], "__main__ ['3', '--help', '-m', '--', 'x']", 3),
        (["./ends.py", "0"], "__main__ ['0']", 0),
        (["-m", "ends", "4", "-h"], "__main__ ['4', '-h']", 4),
        (["-m", "package", "--version", "-m"], "__main__ ['--version', '-m']", 0),
        (["ends-with", "5", "--version"], "ends ['5', '--version']", 5),
        (["of_python", "--x", "y"], "__main__ ['--x', 'y']", 0),
        (["bin/of_python"], "__main__ []", 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_arguments_and_exit_codes_are_those_of_the_program(run: Run, words: list[str], output: str, code: int) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (code, output, "")


def test_errors_of_the_program_are_not_changed(run: Run) -> None:
    done = run("fails.py")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == "ValueError: of the program"
    assert run("-m", "broken").stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'not_there'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--x"], "There is no program 'nowhere' here: name a command of this environment, a SCRIPT.py, or"),
        (["nowhere.py"], "There is no file 'nowhere.py'."),
        (["of_sh"], "of_sh' is no Python program, and would run in a process of its own"),
        (["-m", "nowhere.at.all"], "There is no module 'nowhere.at.all' here that can be run."),
        (["-m", "nothing"], "There is no module 'nothing' here that can be run."),
        (["-m"], "`-m` needs the name of a module."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_missing_program_is_one_sentence(run: Run, words: list[str], message: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("prefix-ext run: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_help_and_wrong_usage(run: Run) -> None:
    assert "prefix-ext run lm_eval --model hf" in run("--help").stdout
    assert run().returncode == 2
