"""Code blocks for programs that are not installed for the tests: what they say is checked against recorded releases."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.other_trainers import PROGRAMS, integration, newest
from helpers.release_sources import imported_by, parameters
from peft_prefix_ext.integrations.peft_factory.prefixext.config import PrefixExtArguments


def imports_a_program(code: str) -> bool:
    """Whether Python code imports a program; then all that it imports of it is there."""
    asked = {name: imported_by(code, program.package) for name, program in PROGRAMS.items()}
    for name, names in asked.items():
        assert all(newest(name)["names"][each] for each in names)
    compile(code, "page", "exec")
    return any(asked.values())


def check_options(name: str, options: Iterable[str], ours: Iterable[str] = ()) -> None:
    """Each option is one of the newest release of a program, or ours."""
    there = newest(name)["options"]
    assert [option for option in options if not there[option] and option not in ours] == []


def check_swift(words: list[str]) -> None:
    """Of `swift sft --option ...`: ms-swift has the options, and the plugin registers the tuner."""
    flags = {word[2:]: words[index + 1] for index, word in enumerate(words) if word.startswith("--")}
    check_options("ms_swift", flags)
    with integration("ms_swift") as module:
        exec(compile(Path(flags["external_plugins"]).read_text(), "plugin", "exec"), {})
        assert list(module.tuners_map) == [flags["tuner_type"]]


def check_lm_eval(words: list[str]) -> None:
    """Of `lm_eval --model MODEL --model_args NAME=VALUE,...`: the model takes the arguments."""
    options = dict(zip(words[1::2], words[2::2], strict=True))
    functions = dict(zip(("hf", "local-completions", "vllm"), PROGRAMS["lm_eval"].functions, strict=True))
    signature = parameters(newest("lm_eval")["signatures"][functions[options["--model"]]])
    there = {argument.arg for argument in signature.args}
    assert {pair.partition("=")[0] for pair in options["--model_args"].split(",")} <= there


def check_configuration(options: dict[str, Any]) -> None:
    """The YAML of Axolotl or PEFT-Factory: the program has the options, or ours has them and takes their values."""
    if "plugins" in options:
        with integration("axolotl") as module:
            check_options("axolotl", options, module.PrefixExtArgs.model_fields)
            assert options["plugins"] == [f"{module.__name__}.{module.PrefixExtPlugin.__name__}"]
            assert module.PrefixExtArgs(**options).prefix_ext == options["prefix_ext"]
        return
    ours = set(PrefixExtArguments.__dataclass_fields__)
    check_options("peftfactory", options, ours)
    assert options["finetuning_type"] == PrefixExtArguments.__module__.split(".")[-2]
    assert PrefixExtArguments(**{name: value for name, value in options.items() if name in ours}).task_type
