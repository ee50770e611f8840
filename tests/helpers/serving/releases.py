"""What the plugin needs of vLLM, as each supported release has it, read from its syntax trees.

    PYTHONPATH=tests python -m helpers.serving.releases WHEEL_OR_FOLDER ...

writes `releases.json` for the given releases and prints what each changed. A release is a wheel or a folder with
`vllm/` in it, and need not run here. Run it when the plugin needs something else of vLLM, and for each new release.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from helpers.release_sources import Release, imported, order, record
from vllm_plugin.patches.install import all_patches
from vllm_plugin.patches.patch import MethodPatch
from vllm_plugin.prefix_serve import parser_patch

RECORDED = Path(__file__).with_name("releases.json")
PLUGIN = Path(__file__).parents[3] / "vllm_plugin"
# Model runner V2 has them since 0.31, and the plugin imports them only for it.
LOGITS_PROCESSORS_V2 = "vllm.v1.worker.gpu.sample.logits_processor"
_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"
# Methods that our connector has for releases from 0.33 on.
SLEEP = {f"{_BASE}.unregister_kv_caches", f"{_BASE}.restore_kv_caches"}
# Methods that the plugin calls on vLLM's objects.
CALLED = {
    "vllm.lora.peft_helper:PEFTHelper.from_local_dir",
    "vllm.lora.peft_helper:PEFTHelper.validate_legal",
    "vllm.v1.engine.async_llm:AsyncLLM.add_lora",
    "vllm.v1.request:Request.update_block_hashes",
    "vllm.v1.core.kv_cache_utils:maybe_convert_block_hash",
    "vllm.v1.core.kv_cache_utils:resolve_block_hashes",
    "vllm.v1.core.block_pool:BlockPool.get_cached_block",
    "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.append_n",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.remove",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock.block_hash",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock.block_hash_num_tokens",
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks.get_block_ids",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_blocks",
    "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.register_connector",
    f"{_BASE}.reset_cache",
    "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector:MultiConnector.sub_connectors",
    "vllm.config.kv_transfer:KVTransferConfig.get_from_extra_config",
    "vllm.v1.metrics.stats:PrefillStats.finalize",
    "vllm.v1.metrics.stats:PrefillStats.set",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.is_base_model",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.__init__",
    *SLEEP,
}


def overridden() -> set[str]:
    """Returns the methods of vLLM's connectors that ours overrides, as `module:Class.method`."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    from vllm_plugin.connector import PrefixConnector

    return {
        f"{base.__name__}:{parent.__name__}.{name}"
        for parent in (base.KVConnectorBase_V1, base.SupportsHMA)
        for name in vars(PrefixConnector).keys() & vars(parent).keys()
        if callable(getattr(PrefixConnector, name))
    }


def all_method_patches() -> tuple[MethodPatch, ...]:
    """Returns all patches of the plugin."""
    return (parser_patch(), *all_patches(server=True, kv_events=True))


def wrapped() -> set[str]:
    """Returns the functions of vLLM that the plugin wraps, as `module:qualified.name`."""
    return {f"{patch.module}:{patch.method}" for patch in all_method_patches()}


def needed(name: str, version: str) -> bool:
    """Says whether the plugin needs a function or a name of vLLM in a release."""
    release = order(version)[:2]
    if name.startswith(LOGITS_PROCESSORS_V2):
        return release >= (0, 31)
    if name in SLEEP:
        return release >= (0, 33)
    patches = [patch for patch in all_method_patches() if f"{patch.module}:{patch.method}" == name]
    return any(patch.is_for(release) for patch in patches) if patches else True


def describe(release: Release) -> dict[str, Any]:
    """Returns the signatures and names that a release has of those the plugin needs."""
    return {
        "signatures": {name: release.signature(name) for name in sorted(wrapped() | overridden() | CALLED)},
        "names": {name: release.has(name) for name in sorted(imported(PLUGIN, "vllm"))},
    }


def main(places: list[str]) -> None:
    releases = [Release("vllm", Path(place)) for place in places]
    record(RECORDED, ((release.version, describe(release)) for release in releases))


if __name__ == "__main__":
    main(sys.argv[1:])
