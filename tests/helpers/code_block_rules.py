"""What becomes of a code block in a test, by its language: it is run, or what it says is read as its program would read it."""

from __future__ import annotations

import configparser
import functools
import json
import os
import re
import shlex
import subprocess
import tomllib
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from helpers.code_blocks import LOCAL, ROOT, Block, commands, run
from helpers.program_rules import check_configuration, check_lm_eval, check_swift, imports_a_program
from peft_prefix_ext.cli import main
from peft_prefix_ext.training.columns import examples_of, format_of

PORT = 8000  # of the pages
ENGINE = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}


class Page:
    """A page that is being read.

    Args:
        folder: Where it is read: with the base models, and the adapter that the README trains.
    """

    def __init__(self, folder: Path, server: Callable[[], int]) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "page"}
        self._server = server

    def address(self, text: str) -> str:
        """Puts the server's real port into what a client runs, once it answers."""
        return text.replace(f"localhost:{PORT}", f"localhost:{self._server()}")

    def get(self, path: str) -> str:
        """Asks the server, which must answer with 200."""
        with urllib.request.urlopen(self.address(f"http://localhost:{PORT}{path}")) as answer:
            assert answer.status == 200
            return answer.read().decode()


# Checks of what cannot run in a test.


@functools.cache
def serve_parser() -> Any:
    """vLLM's own parser of `vllm serve`, with the plugin's options."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_plugin import register

    register()
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    return parser


def check_serve(words: list[str]) -> None:
    """Reads the arguments of `vllm serve` as vLLM does: `MODEL --option ...`."""
    options = serve_parser().parse_args(["serve", *words])
    assert options.model_tag
    assert options.prefix_adapter or options.enable_prefix_adapters or options.prefix_adapter_dir


def check_install(words: list[str]) -> None:
    """Of this package, asks for extras that there are."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[1:]:
        if word.startswith("."):
            asked = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", word)
            assert asked, word
            assert not asked[1] or set(asked[1].split(",")) <= extras.keys(), word


def check_make(words: list[str]) -> None:
    """Make knows the target."""
    subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def check_script(words: list[str]) -> None:
    """Of `python SCRIPT` and `python -m MODULE ...`: a script is there, extras of this package are."""
    script = next((word for word in words if word.endswith(".py")), None)
    assert script is None or (ROOT / script).is_file()
    check_install(words)


def check_benchmark(words: list[str]) -> None:
    """Of `python -m benchmarks.NAME --option ...`: it is there, and its options have a name in its code."""
    _, flag, module, *options = words
    folder = ROOT.joinpath(*module.split("."))
    assert flag == "-m"
    assert (folder / "__main__.py").is_file(), module
    code = "".join(path.read_text() for path in (*folder.glob("*.py"), *ROOT.glob("benchmarks/common/*.py")))
    for option in options:
        if option.startswith("--") and option != "--help":
            assert re.search(rf"\b{option[2:].replace('-', '[-_]')}\b", code), (module, option)


def check_file(words: list[str]) -> None:
    """Of a script of the repository: it is there, and can be executed."""
    assert os.access(ROOT / words[0], os.X_OK)


def check_docker_run(words: list[str]) -> None:
    """The image is the one that is built, and what follows it are arguments of `vllm serve`, its entry point."""
    image = words.index("prefix-server")
    check_serve(words[image + 1 :])


def check_nothing(words: list[str]) -> None:
    pass


# Commands that do not run here, by how they begin: why not, and what is checked instead.
NOT_RUN: dict[tuple[str, ...], tuple[str, Callable[[list[str]], None]]] = {
    ("pip", "install"): ("installs into the environment of the tests", check_install),
    ("pip", "wheel"): ("builds what `make test-wheel` builds", check_nothing),
    ("python3", "-m", "venv"): ("makes an environment, which takes a network", check_nothing),
    (".venv/bin/python",): ("is in an environment that is made with a network", check_script),
    ("uv", "venv"): ("no test needs uv", check_nothing),
    ("uv", "pip", "install"): ("no test needs uv", check_install),
    ("python", "-m"): ("takes minutes to hours", check_benchmark),
    ("benchmarks/gpu.sh",): ("needs a GPU", check_file),
    ("make",): ("runs the tests or takes minutes", check_make),
    ("docker", "build"): ("needs a daemon and vLLM's image", check_nothing),
    ("docker", "run"): ("needs a daemon and vLLM's image", check_docker_run),
    ("kubectl", "apply"): ("needs a cluster", check_nothing),
    ("sudo", "systemctl"): ("needs an init system and its rights", check_nothing),
    ("prefix-ext", "run", "lm_eval"): ("lm_eval is no dependency of the tests", lambda words: check_lm_eval(words[2:])),
    ("lm_eval",): ("lm_eval is no dependency of the tests", check_lm_eval),
    ("swift", "sft"): ("ms-swift wants an older PEFT", check_swift),
}


# The rules: what becomes of a block, by its language.


def python(each: Block, page: Page) -> None:
    if imports_a_program(each.code):
        return
    code = page.address(each.local_code) if "localhost" in each.code else each.local_code
    if "__main__" not in code:
        exec(compile(code, str(each), "exec"), page.names)
        return
    settings = "".join(f"{name}={value!r}, " for name, value in ENGINE.items())
    assert run(code.replace(f'model="{LOCAL}", ', f'model="{LOCAL}", {settings}'), page.folder).strip()


def shell(each: Block, page: Page) -> None:
    for words in commands(each.local_code):
        reason_and_check = next((NOT_RUN[begin] for begin in NOT_RUN if tuple(words[: len(begin)]) == begin), None)
        if reason_and_check is not None:
            reason_and_check[1](words)
        elif words[0] == "prefix-ext":
            main(words[1:])
        elif words[:2] == ["vllm", "serve"]:
            check_serve(words[2:])
        elif words[0] == "prefix-serve":
            check_serve(words[1:])
        elif words[0] == "echo" and words[-2] in (">", ">>"):
            with (page.folder / words[-1]).open("w" if words[-2] == ">" else "a", encoding="utf-8") as file:
                file.write(" ".join(words[1:-2]) + "\n")
        elif words[0] == "curl":
            command = [page.address(word) for word in words]
            subprocess.run([*command, "--fail-with-body", "--silent"], cwd=page.folder, check=True, capture_output=True)
        else:
            pytest.fail(f"{each}: no rule for {shlex.join(words)!r}; run it, or list it in NOT_RUN")


def manifest_or_configuration(each: Block, page: Page) -> None:
    """A manifest for Kubernetes, or the configuration of a trainer."""
    documents = list(yaml.safe_load_all(each.code))
    if "kind" in documents[0]:
        kubernetes(documents, page)
    else:
        check_configuration(*documents)


def kubernetes(manifest: list[Any], page: Page) -> None:
    """The options are read by vLLM's parser, names fit together, probes answer."""
    documents = {document["kind"]: document for document in manifest}
    assert documents.keys() == {"Deployment", "Service"}
    template = documents["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert documents["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert documents["Service"]["spec"]["selector"] == labels
    (container,) = template["spec"]["containers"]
    check_serve(container["args"])
    (port,) = (port["containerPort"] for port in container["ports"])
    assert [port["targetPort"] for port in documents["Service"]["spec"]["ports"]] == [port]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in template["spec"]["volumes"]
    }
    for probe in ("startupProbe", "readinessProbe"):
        probed = container[probe]["httpGet"]
        assert probed["port"] == port
        page.get(probed["path"])


def unit(each: Block, page: Page) -> None:
    """A systemd unit: its sections are known, and what it starts is read by vLLM's parser."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(each.code)
    assert parser.sections() == ["Unit", "Service", "Install"]
    program, command, *words = shlex.split(parser["Service"]["ExecStart"])
    assert Path(program).is_absolute()  # as systemd has it
    assert (Path(program).name, command) == ("vllm", "serve")
    check_serve(words)


def dockerfile(each: Block, page: Page) -> None:
    """vLLM's image of a release that is supported, and two lines of ours."""
    first, *ours = each.code.splitlines()
    release = re.fullmatch(r"FROM vllm/vllm-openai:v(\d+\.\d+)\.\d+", first)
    assert release
    serve = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["serve"]
    assert release[1] in Requirement(serve[0]).specifier
    assert [line.split()[0] for line in ours] == ["COPY", "RUN"]
    (source, target), installed = ours[0].split()[1:], ours[1].split()[-1]
    assert installed == target + Path(source).name


def adapter_config_or_row(each: Block, page: Page) -> None:
    """The fields are those of an adapter that was saved; a row of a data set is one that can be trained on."""
    shown = json.loads(each.code)
    if "peft_type" not in shown:
        form = format_of(shown, {})
        assert form is not None
        assert examples_of(shown, form, {}, has_chat_template=True)
        return
    saved = json.loads((page.folder / "restaurant" / "adapter_config.json").read_text())
    assert shown.keys() <= saved.keys()
    assert shown["base_fingerprint"].keys() <= saved["base_fingerprint"].keys()
    assert shown["prefix_layers"][0].keys() == saved["prefix_layers"][0].keys()
    for name in ("peft_type", "format_version", "num_virtual_tokens"):
        assert shown[name] == saved[name]


def names_and_trees(each: Block, page: Page) -> None:
    """Names of tensors, and trees of files, which other tests look into."""
    assert each.code.startswith(("base_model.model.", "peft_prefix_ext/"))


RULES: dict[str, Callable[[Block, Page], None]] = {
    "python": python,
    "bash": shell,
    "yaml": manifest_or_configuration,
    "ini": unit,
    "dockerfile": dockerfile,
    "json": adapter_config_or_row,
    "text": names_and_trees,
    # Sphinx's own, which `make docs` builds strictly.
    "{toctree}": lambda each, page: None,
    "{eval-rst}": lambda each, page: None,
}
