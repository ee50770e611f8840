"""`prefix-ext run`: other Python programs in this process, where PEFT knows the type `PREFIX_EXT`.

PEFT has no entry points for methods, so where nothing imports this package, as in a program that takes the path of any
adapter, one of ours ends in `KeyError: 'PREFIX_EXT'`. Here it is imported already, and registers once PEFT is.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

Program = Callable[[], object]


def find_program(words: Sequence[str]) -> Program:
    """Returns what runs `PROGRAM ARGUMENT ...`, `SCRIPT.py ARGUMENT ...` or `-m MODULE ARGUMENT ...` as `__main__`.

    What it returns leaves `sys.argv` and `sys.path` as `python` would, and raises what the program raises: `SystemExit`
    with its exit code.

    Raises:
        ValueError: If there is no such program, or it is none that runs in this process.
    """
    name, *arguments = words
    if name == "-m":
        if not arguments:
            raise ValueError("`-m` needs the name of a module.")
        return _module(*arguments)
    if name.endswith(".py") or os.sep in name:
        return _script(name, arguments)
    found = shutil.which(name)
    script = next(iter(entry_points(group="console_scripts", name=name)), None)
    if script is not None:
        return _as_main(found or name, arguments, lambda: sys.exit(script.load()()))
    if found is None:
        raise ValueError(
            f"There is no program {name!r} here: name a command of this environment, a SCRIPT.py, or -m MODULE."
        )
    return _script(found, arguments)


def _script(path: str, arguments: Sequence[str]) -> Program:
    if not os.path.exists(path):
        raise ValueError(f"There is no file {path!r}.")
    if os.path.isfile(path) and not path.endswith(".py") and not _is_python(path):
        raise ValueError(
            f"{path!r} is no Python program, and would run in a process of its own: name a command that is one, a SCRIPT.py, "
            "or -m MODULE."
        )
    folder = os.path.dirname(os.path.realpath(path))
    return _as_main(path, arguments, lambda: runpy.run_path(path, run_name="__main__"), folder)


def _is_python(path: str) -> bool:
    with Path(path).open("rb") as file:
        first = file.readline(256)
    return first.startswith(b"#!") and b"python" in first


def _module(name: str, *arguments: str) -> Program:
    sys.path.insert(0, os.getcwd())
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        # A parent that is not there; not what a parent that is there imports.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        spec = None
    finally:
        sys.path.pop(0)
    if spec is None:
        raise ValueError(f"There is no module {name!r} here that can be run.")
    return _as_main(name, arguments, lambda: runpy.run_module(name, run_name="__main__", alter_sys=True), os.getcwd())


def _as_main(name: str, arguments: Sequence[str], program: Program, folder: str | None = None) -> Program:
    def run() -> object:
        sys.argv[:] = [name, *arguments]
        if folder is not None:
            sys.path.insert(0, folder)
        return program()

    return run
