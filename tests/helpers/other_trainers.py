"""What the integrations need of other people's programs, as found in their releases, which are not installed for the tests.

    PYTHONPATH=tests python -m helpers.other_trainers WHEEL ...

records the wheels given, and says what each changed. Do so when an integration or its page needs something else of them, or
when there is a new release.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.parser import Parser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import yaml
from packaging.requirements import Requirement

from helpers.code_blocks import ROOT, blocks, commands
from helpers.release_sources import Release, imported, imported_by, order, record

RECORDED = Path(__file__).with_name("recorded")
PAGE = ROOT / "docs" / "integrations.md"
# All of them also have the arguments of transformers' own trainers.
TRANSFORMERS = Path(str(find_spec("transformers").origin)).parent  # type: ignore[union-attr]
ARGUMENTS = ("training_args.py", "training_args_seq2seq.py")
# Releases of these that a program asks for, beside those that this package does.
LIBRARIES = ("torch", "transformers", "peft", "trl")


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that prefixes are used in.

    Args:
        package: The package that it is imported as.
        functions: The functions that ours override, or that the page calls.
        options: Folders and files of the dataclasses and models whose fields are its options.
    """

    package: str
    functions: tuple[str, ...]
    options: tuple[str, ...] = ()


PROGRAMS = {
    "axolotl": Program(
        "axolotl",
        functions=(
            "axolotl.integrations.base:BasePlugin.get_input_args",
            "axolotl.integrations.base:BasePlugin.get_adapter_capabilities",
            "axolotl.integrations.base:BasePlugin.load_adapter",
        ),
        options=("axolotl/utils/schemas",),
    ),
    "ms_swift": Program(
        "swift",
        functions=(
            "swift.tuner_plugin.base:Tuner.prepare_model",
            "swift.tuner_plugin.base:PeftTuner.save_pretrained",
            "swift.tuner_plugin.base:PeftTuner.from_pretrained",
        ),
        options=("swift/arguments", "swift/arguments/base_args", "swift/trainers/arguments.py"),
    ),
    "peftfactory": Program(
        "llamafactory",
        functions=(
            "llamafactory.extras.peft_loader:discover_custom_peft_methods",
            "llamafactory.model.adapter:_setup_custom_peft",
        ),
        options=("llamafactory/hparams",),
    ),
    "lm_eval": Program(
        "lm_eval",
        functions=(
            "lm_eval.models.huggingface:HFLM.__init__",
            "lm_eval.models.api_models:TemplateAPI.__init__",
            "lm_eval.models.vllm_causallms:VLLM.__init__",
        ),
    ),
}


def page_options() -> dict[str, set[str]]:
    """Returns the options that the page gives each program: keys of YAML, and those of commands."""
    found: dict[str, set[str]] = {name: set() for name in PROGRAMS}
    for each in blocks(PAGE):
        if each.language == "yaml":
            options = yaml.safe_load(each.code)
            found["axolotl" if "plugins" in options else "peftfactory"] |= set(options)
        for words in commands(each.code) if each.language == "bash" else ():
            if words[0] == "swift":
                found["ms_swift"] |= {word[2:] for word in words if word.startswith("--")}
    return found


def imports(package: str) -> set[str]:
    """Lists what the training half and the page import from a package, as `module:name`."""
    code = "\n".join(each.code for each in blocks(PAGE) if each.language == "python")
    return imported(ROOT / "peft_prefix_ext", package) | imported_by(code, package)


def describe(name: str, wheel: Path) -> dict[str, Any]:
    """Returns what a wheel has of what is needed."""
    program, release = PROGRAMS[name], Release(PROGRAMS[name].package, wheel)
    there = {*_fields(wheel, program.options), *_fields(TRANSFORMERS, ARGUMENTS)}
    return {
        "requires": requirements(wheel),
        "signatures": {function: release.signature(function) for function in program.functions},
        "names": {each: release.has(each) for each in sorted(imports(program.package))},
        "options": {option: option in there for option in sorted(page_options()[name])},
    }


def requirements(wheel: Path) -> dict[str, str]:
    """Returns which releases of `LIBRARIES` a wheel asks for."""
    with zipfile.ZipFile(wheel) as file:
        metadata = next(each for each in file.namelist() if each.endswith(".dist-info/METADATA"))
        asked = Parser().parsestr(file.read(metadata).decode()).get_all("Requires-Dist", [])
    found = [Requirement(each) for each in asked]
    return {each.name: str(each.specifier) for each in found if each.name in LIBRARIES and _applies(each)}


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _fields(root: Path, places: tuple[str, ...]) -> Iterator[str]:
    """Yields the fields of all classes in folders and files of a wheel, or below a folder."""
    for place in places:
        path = zipfile.Path(root, place) if root.is_file() else root / place
        for file in [path] if place.endswith(".py") else zipfile.Path(root, f"{place}/").iterdir():
            if file.name.endswith(".py"):
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                    for each in node.body if isinstance(node, ast.ClassDef) else []:
                        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                            yield each.target.id


def recorded(name: str) -> dict[str, Any]:
    """Returns what is recorded of a program, by version."""
    found: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def newest(name: str) -> dict[str, Any]:
    """Returns what is recorded of the newest release of a program."""
    return list(recorded(name).values())[-1]


def stand_in(module: str, signatures: Mapping[str, str], **more: Any) -> ModuleType:
    """Makes a module whose classes have the recorded methods, all of which do nothing.

    Args:
        module: Its name.
        signatures: The methods, as they are recorded.
        more: What else the module has.
    """
    code: dict[str, list[str]] = {}
    for name, signature in signatures.items():
        owner, _, method = name.partition(":")[2].partition(".")
        static = [] if signature.startswith("(self") else ["@staticmethod"]
        code.setdefault(owner, []).extend([*static, f"def {method}{signature}: pass"])
    made = ModuleType(module)
    for owner, lines in code.items():
        exec(f"class {owner}:\n" + "\n".join(f"    {line}" for line in lines), made.__dict__)
    vars(made).update(more)
    return made


@contextmanager
def integration(name: str) -> Iterator[ModuleType]:
    """Imports `axolotl` or `ms_swift` of the integrations, beside a stand-in for what that program is recorded to have."""
    signatures = newest(name)["signatures"]
    if name == "axolotl":
        capabilities = dataclasses.make_dataclass("AdapterCapabilities", ["name"])
        made = stand_in("axolotl.integrations.base", signatures, AdapterCapabilities=capabilities)
    else:
        made = stand_in("swift.tuner_plugin", signatures, tuners_map={})
    parents = made.__name__.split(".")[:-1]
    packages = [".".join(parents[: length + 1]) for length in range(len(parents))]
    ours = f"peft_prefix_ext.integrations.{name}"
    modules = {**{package: ModuleType(package) for package in packages}, made.__name__: made}
    with patch.dict(sys.modules, modules):
        sys.modules.pop(ours, None)
        try:
            yield import_module(ours)
        finally:
            sys.modules.pop(ours, None)


def main(*wheels: str) -> None:
    for wheel in sorted(map(Path, wheels), key=lambda path: order(path.name.split("-")[1])):
        name, version = wheel.name.split("-")[:2]
        record(RECORDED / f"{name}.json", [(re.sub(r"[^\d.].*", "", version), describe(name, wheel))])


if __name__ == "__main__":
    main(*sys.argv[1:])
