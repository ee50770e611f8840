"""What the plugin takes for granted of vLLM, as each supported release has it, read from its syntax trees.

    python tests/serving/releases.py WHEEL_OR_FOLDER ...

writes `releases.json` for the releases given, each a wheel or a folder with `vllm/` in it, which need not run here. Do so
when the plugin needs something else of vLLM, or when there is a new release.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_name("releases.json")
PLUGIN = Path(__file__).parents[2] / "vllm_plugin"
# What is called on objects that vLLM hands to the plugin.
CALLED = {
    "vllm.lora.peft_helper:PEFTHelper.from_local_dir",
    "vllm.lora.peft_helper:PEFTHelper.validate_legal",
    "vllm.v1.engine.async_llm:AsyncLLM.add_lora",
    "vllm.v1.request:Request.update_block_hashes",
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks.get_block_ids",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids",
    "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.register_connector",
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.reset_cache",
    "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector:MultiConnector.sub_connectors",
    "vllm.config.kv_transfer:KVTransferConfig.get_from_extra_config",
    "vllm.v1.metrics.stats:PrefillStats.finalize",
    "vllm.v1.metrics.stats:PrefillStats.set",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.is_base_model",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.__init__",
}


def overridden() -> set[str]:
    """Lists the methods of vLLM's connectors that ours overrides, as `module:Class.method`."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    from vllm_plugin.connector import PrefixConnector

    return {
        f"{base.__name__}:{parent.__name__}.{name}"
        for parent in (base.KVConnectorBase_V1, base.SupportsHMA)
        for name in vars(PrefixConnector).keys() & vars(parent).keys()
        if callable(getattr(PrefixConnector, name))
    }


def seams() -> tuple[Any, ...]:
    """Returns all of the plugin's wraps."""
    from vllm_plugin.compat import START_SEAMS
    from vllm_plugin.seams import ENGINE_SEAMS, SERVER_SEAMS

    return START_SEAMS + ENGINE_SEAMS + SERVER_SEAMS


def wrapped() -> set[str]:
    """Lists the functions of vLLM that the plugin wraps, as `module:qualified.name`."""
    return {f"{seam.module}:{seam.method}" for seam in seams()}


def imported() -> set[str]:
    """Lists what the plugin imports from vLLM, as `module:name`."""
    return {
        f"{node.module}:{alias.name}"
        for path in PLUGIN.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }


class Release:
    """The sources of one release of vLLM.

    Args:
        place: A wheel, or the folder that holds the package `vllm`.
    """

    def __init__(self, place: Path) -> None:
        self._folder: Any = zipfile.Path(place) if place.is_file() else place

    @property
    def version(self) -> str:
        """The version that the sources say they are."""
        text = self._folder.joinpath("vllm", "_version.py").read_text(encoding="utf-8")
        (found,) = re.findall(r"^__version__ = version = '([\d.]+)", text, re.MULTILINE)
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
            # vLLM's own package names what it imports on use in a dict.
            if wanted in (defined, literal, getattr(node, "id", None)):
                return True
        return False

    def describe(self) -> dict[str, Any]:
        return {
            "signatures": {name: self.signature(name) for name in sorted(wrapped() | overridden() | CALLED)},
            "names": {name: self.has(name) for name in sorted(imported())},
        }


def main(places: list[str]) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    for place in places:
        release = Release(Path(place))
        recorded[release.version] = release.describe()
    RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
