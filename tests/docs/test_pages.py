"""What the pages say agrees with the code: links, figures, options, names, messages."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.code_blocks import README, ROOT, blocks, pages
from peft_prefix_ext import PrefixExtConfig
from peft_prefix_ext.cli import main

DOCS = ROOT / "docs"
REPOSITORY = "peft-prefix-ext/peft-prefix-ext"
# Files of this repository by their address, as a registry that shows the README needs it.
ABSOLUTE = re.compile(rf"https://(?:github\.com/{REPOSITORY}/blob|raw\.githubusercontent\.com/{REPOSITORY})/main/(.+)")
COMMANDS = (
    "train",
    "evaluate",
    "chat",
    "inspect",
    "verify",
    "export",
    "import",
    "compose",
    "compile",
    "distill",
    "run",
)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def outside_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def section(page: Path, title: str) -> str:
    """Returns what follows a heading, without blocks, up to the next of its level or of a higher one."""
    _, found, rest = outside_blocks(page).partition(f"\n{title}\n")
    assert found, title
    return re.split(rf"^#{{1,{title.index(' ')}}} ", rest, flags=re.MULTILINE)[0]


def test_the_readme_is_short_and_starts_with_code() -> None:
    assert len(text_of(README).splitlines()) <= 160
    first = {name: next(each.line for each in blocks(README) if name in each.code) for name in ("vllm serve", "curl")}
    assert max(first.values()) <= 60
    assert next(each for each in blocks(README) if "get_peft_model" in each.code).code.count("\n") <= 15


def test_the_two_commands_are_in_the_readme() -> None:
    commands = next(each.code for each in blocks(README) if "make demo" in each.code)
    assert [line.split("#")[0].strip() for line in commands.splitlines()] == ["make demo", "make test"]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Those within the repository; headings of other pages are checked by the strict build."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", outside_blocks(page))):
        if (absolute := ABSOLUTE.fullmatch(target)) is not None:
            assert (ROOT / absolute[1].partition("#")[0]).exists(), target
        elif not target.startswith(("https://", "http://")):
            assert page != README, f"{target}: the README is shown by registries, which need absolute addresses"
            path = target.partition("#")[0]
            assert not path or (page.parent / path).exists(), target


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_all_code_is_in_blocks_that_are_run(page: Path) -> None:
    assert not re.search(r"\n\n(?: {4,}|\t)", outside_blocks(page))


def test_the_figures_of_the_readme_are_those_of_the_benchmarks() -> None:
    rows = [line for line in section(README, "## Results").splitlines() if re.search(r"\| \[\w+\]\(", line)]
    assert len(rows) == 5
    for row in rows:
        *cells, link = row.strip("| ").split(" | ")
        page = text_of(ROOT / ABSOLUTE.fullmatch(link.partition("(")[2].rstrip(")"))[1])  # type: ignore[index]
        figures = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", " ".join(cells))
        assert figures
        for figure in figures:
            assert figure in page, (figure, link)


def test_options_of_prefix_ext_are_those_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        there = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--help"}
        told = section(DOCS / "cli.md", f"### {command}")
        rows = [line.split("|")[1] for line in told.splitlines() if line.startswith("| `--")]
        assert {option for row in rows for option in re.findall(r"--[\w-]+", row)} == there, command
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^    (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert tuple(listed) == COMMANDS


def test_every_initialization_is_on_its_page() -> None:
    with pytest.raises(ValueError, match="`init` must be one of") as refusal:
        PrefixExtConfig(init="none of them")
    there = set(re.findall(r"'(\w+)'", str(refusal.value).partition(", got")[0])) - {"auto"}
    told = text_of(DOCS / "initialization.md").splitlines()
    assert there == {name for line in told for name in re.findall(r"^\| `(\w+)` \|", line)} - {"init"}


def test_every_field_of_the_config_is_on_a_page() -> None:
    inherited = {field.name for field in dataclasses.fields(PrefixExtConfig.__mro__[1])}
    own = {field.name for field in dataclasses.fields(PrefixExtConfig)} - inherited
    told = "\n".join(text_of(page) for page in pages())
    assert not {name for name in own if not re.search(rf"`[^`\n]*\b{name}\b|\b{name}=", told)}


def test_the_tree_is_that_of_the_repository() -> None:
    (tree,) = (each.code for each in blocks(DOCS / "development.md") if each.language == "text")
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ROOT
        assert (folder / name).exists(), line
        if not line.startswith(" "):
            folder = ROOT / name


def messages() -> Iterator[str]:
    """Yields every text of the packages' code, what is filled in as a line break."""
    known = {"CONFIG_NAME": "adapter_config.json", "WEIGHTS_NAME": "adapter_model.safetensors"}
    for path in (*ROOT.glob("peft_prefix_ext/**/*.py"), *ROOT.glob("vllm_plugin/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value)
                    if isinstance(part, ast.Constant)
                    else known.get(getattr(part.value, "id", ""), "\n")  # type: ignore[attr-defined]
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[rsd]", "\n", node.value)


def test_messages_are_those_of_the_code() -> None:
    """Each part of a message that is quoted, in its order, in one text of the code."""
    rows = section(DOCS / "operations.md", "## When an adapter is refused").splitlines()
    quoted = [re.fullmatch(r"\| `([^`]+)` \|.*", row) for row in rows]
    told = [found[1] for found in quoted if found]
    assert len(told) == sum(row.startswith("| `") for row in rows) >= 15
    there = list(messages())
    for message in told:
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert any(pattern.search(text) for text in there), message
