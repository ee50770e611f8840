"""`prefix-ext run`: runs another Python program in this process, where PEFT knows the type `PREFIX_EXT`.

PEFT has no entry points for methods. A program that loads any adapter but never imports this package ends in
`KeyError: 'PREFIX_EXT'`. Here the package is imported before the program, and registers once PEFT is imported.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft_prefix_ext.cli.common import add_command, refuse

Program = Callable[[], object]


def add_parser(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "run",
        run,
        summary="run another Python program that loads prefixes",
        description="Runs a command of this environment, a script or a module in this process, with PREFIX_EXT registered in\n"
        "PEFT. Use it for programs that load any adapter and fail with KeyError: 'PREFIX_EXT'. Processes that the\n"
        "program starts must import peft_prefix_ext themselves; with a launcher, run each of them with it:\n"
        "torchrun -m peft_prefix_ext run train.py",
        examples="  prefix-ext run lm_eval --model hf --model_args pretrained=BASE,peft=./restaurant --tasks hellaswag\n"
        "  prefix-ext run generate.py --adapter ./restaurant\n  prefix-ext run -m package.module --option",
        exit_codes="exit codes: those of the program; 1 if there is no such program",
    )
    parser.usage = "prefix-ext run [-h] (PROGRAM | SCRIPT.py | -m MODULE) [ARGUMENT ...]"
    parser.add_argument(
        "program", metavar="PROGRAM", nargs="+", help="the program and its arguments, which are passed on unchanged"
    )


def run(args: argparse.Namespace) -> None:
    try:
        program = find_program(args.program)
    except ValueError as error:
        refuse("run", error)
    program()  # its errors and exit codes are its own


def find_program(words: Sequence[str]) -> Program:
    """Finds what `PROGRAM ARGUMENT ...`, `SCRIPT.py ARGUMENT ...` or `-m MODULE ARGUMENT ...` would run as `__main__`.

    The program sets `sys.argv` and `sys.path` as `python` would. It raises `SystemExit` with its exit code, and its own
    errors.

    Raises:
        ValueError: If there is no such program, or it cannot run in this process.
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
            f"{path!r} is no Python program, and would run in a process of its own: name a Python command, a SCRIPT.py, or "
            "-m MODULE."
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
        # Only a missing parent package; not an import that fails inside an existing one.
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
