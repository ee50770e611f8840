"""What pyproject.toml cannot say: the README as a package registry shows it, where relative links lead nowhere."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "peft-prefix-ext/peft-prefix-ext"
IMAGES = f"https://raw.githubusercontent.com/{REPOSITORY}/main/"
PAGES = f"https://github.com/{REPOSITORY}/blob/main/"

RELATIVE = r"(?!\w+:|#|/)"


def absolute(readme: str) -> str:
    """Returns the README with addresses in place of the paths of images and files."""
    readme = re.sub(rf"(!\[[^\]]*\]\(){RELATIVE}", rf"\1{IMAGES}", readme)
    readme = re.sub(rf'(<(?:img|source)\b[^>]*?\bsrc(?:set)?="){RELATIVE}', rf"\1{IMAGES}", readme)
    return re.sub(rf"((?<!!)\[[^\]]*\]\(){RELATIVE}", rf"\1{PAGES}", readme)


setup(
    long_description=absolute(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
