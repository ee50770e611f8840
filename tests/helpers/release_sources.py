"""Definitions in the sources of a release of a package, read from their syntax trees without importing it."""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any


class Release:
    """The sources of one release.

    Args:
        package: The name of the package.
        place: A wheel, or the folder that holds the package.
    """

    def __init__(self, package: str, place: Path) -> None:
        self.package = package
        self._folder: Any = zipfile.Path(place) if place.is_file() else place

    @property
    def version(self) -> str:
        """The version that the sources say they are."""
        files = [self._folder.joinpath(self.package, name) for name in ("_version.py", "__init__.py")]
        text = next(path for path in files if path.exists()).read_text(encoding="utf-8")
        (found,) = re.findall(r"^__version__ = (?:version = )?['\"](\d+(?:\.\d+)*)", text, re.MULTILINE)
        return str(found)

    @cache  # noqa: B019
    def _module(self, name: str) -> ast.Module | None:
        place = self._folder.joinpath(*name.split("."))
        for path in (place.parent / f"{place.name}.py", place / "__init__.py"):
            if path.exists():
                return ast.parse(path.read_text(encoding="utf-8"))
        return None

    def signature(self, name: str) -> str | None:
        """Returns the parameters of `module:qualified.name` without their types; None if there is no such function."""
        module, _, qualified = name.partition(":")
        node: Any = self._module(module)
        for each in [] if node is None else node.body:
            # A package may import the function from one of its modules.
            if isinstance(each, ast.ImportFrom) and qualified in (alias.asname or alias.name for alias in each.names):
                return self.signature(f"{each.module}:{qualified}")
        for part in qualified.split("."):
            body = [] if node is None else node.body
            node = next((each for each in body if getattr(each, "name", None) == part), None)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        return ("async " if isinstance(node, ast.AsyncFunctionDef) else "") + f"({ast.unparse(node.args)})"

    def has(self, name: str) -> bool:
        """Says whether `module:name` can be imported: something of that name is defined or imported there."""
        module, _, wanted = name.partition(":")
        if self._module(f"{module}.{wanted}") is not None:
            return True
        for node in ast.walk(self._module(module) or ast.Module([], [])):
            defined = getattr(node, "name", None) if not isinstance(node, ast.alias) else node.asname or node.name
            literal = node.value if isinstance(node, ast.Constant) else None
            # Packages that import on use name what they have in a dict or a list.
            if wanted in (defined, literal, getattr(node, "id", None)):
                return True
        return False


def imported(folder: Path, package: str) -> set[str]:
    """Lists what the sources in `folder` import from a package, as `module:name`."""
    return {name for path in folder.rglob("*.py") for name in imported_by(path.read_text(encoding="utf-8"), package)}


def imported_by(code: str, package: str) -> set[str]:
    """Lists what code imports from a package, as `module:name`."""
    return {
        f"{node.module}:{alias.name}"
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package
        for alias in node.names
    }


def parameters(signature: str) -> ast.arguments:
    """Returns the parameters of a recorded signature."""
    (function,) = ast.parse(f"def f{signature.removeprefix('async ')}: ...").body
    return function.args  # type: ignore[attr-defined]


def order(version: str) -> tuple[int, ...]:
    """Returns what versions are sorted by."""
    return tuple(int(part) for part in version.split("."))


def record(path: Path, described: Iterable[tuple[str, dict[str, Any]]], say: Callable[[str], None] = print) -> None:
    """Writes what releases have, by version, into the JSON file `path`, and says what each changed.

    Args:
        path: The file, which keeps what it has of other releases.
        described: The versions, and for each what it has, by kind and name.
        say: Takes a line.
    """
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for version, found in described:
        older = max((each for each in recorded if order(each) < order(version)), key=order, default=None)
        recorded[version] = found
        for line in changes(recorded[older], found) if older else []:
            say(f"{older} -> {version}: {line}")
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Says, one line each, in what two releases differ."""
    return [
        f"{name}: {before[kind].get(name)} -> {after[kind].get(name)}"
        for kind in before
        for name in sorted(before[kind].keys() | after[kind].keys())
        if before[kind].get(name) != after[kind].get(name)
    ]
