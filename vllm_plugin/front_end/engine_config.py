"""From the options of a command line to an engine config whose adapters are open, checked, and in the registry."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from vllm_plugin.adapters import loading
from vllm_plugin.adapters.registry import make_folder, registry_at
from vllm_plugin.adapters.spec import (
    ADAPTERS,
    DEVICE_MEMORY,
    REGISTRY,
    WARMUP,
    merge,
    replace_settings,
    settings,
    settings_in,
)
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.front_end.cli_args import AdapterOption, SharedFolder, check_unique
from vllm_plugin.front_end.cpu_cores import keep_cores


def configure(kv_transfer_config: Any, options: Namespace) -> Any:
    """Returns the `KVTransferConfig` of a server that is started with these parsed options, of which some are ours.

    The first process of a server to read them makes its registry, and says in them where it is: the others get them.

    Raises:
        PrefixServeError: If two adapters, or an adapter and a LoRA module, have one name.
    """
    adapters = options.prefix_adapter or []
    if not adapters and not options.enable_prefix_adapters:
        given = "warmup" if options.prefix_adapter_warmup else "device-memory"
        raise PrefixServeError(f"--prefix-adapter-{given} needs --prefix-adapter or --enable-prefix-adapters.")
    from vllm_plugin.patches.install import require

    require(server=True)
    check_unique(adapters)
    modules = getattr(options, "lora_modules", None) or []
    loading.check_served_names([adapter.name for adapter in adapters], [module.name for module in modules])
    if getattr(options, "prefix_registry", None) is None:
        options.prefix_registry = SharedFolder(make_folder())
    more = {REGISTRY: str(options.prefix_registry), WARMUP: options.prefix_adapter_warmup}
    if options.prefix_adapter_device_memory is not None:
        more[DEVICE_MEMORY] = options.prefix_adapter_device_memory
    return merge(kv_transfer_config, settings(adapters, **more))


def create(engine_args: Any, create_engine_config: Callable[[], Any]) -> Any:
    """Makes the config of an engine with prefixes.

    Args:
        engine_args: vLLM's `EngineArgs`, whose `kv_transfer_config` is ours.
        create_engine_config: What vLLM does with them.

    Raises:
        PrefixServeError: If the engine cannot serve prefixes, or not one of these.
    """
    from vllm_plugin.patches.install import require

    require(server=False)
    if getattr(engine_args, "kv_offloading_size", None) is not None:
        raise PrefixServeError(
            "--kv-offloading-size replaces the KV connector of the prefix adapters; name the OffloadingConnector in "
            "--kv-transfer-config instead."
        )
    ours = dict(settings_in(engine_args.kv_transfer_config) or {})
    adapters = [AdapterOption(**fields) for fields in ours.pop(ADAPTERS, [])]
    served = engine_args.served_model_name or [engine_args.model]
    loading.check_served_names([adapter.name for adapter in adapters], [served] if isinstance(served, str) else served)
    ours[REGISTRY] = ours.get(REGISTRY) or make_folder()
    registry = registry_at(ours[REGISTRY])
    engine_args.kv_transfer_config = replace_settings(engine_args.kv_transfer_config, ours)
    vllm_config = create_engine_config()
    loading.check_engine(vllm_config)
    keep_cores(vllm_config)
    # Otherwise another process of this server has done it.
    if registry.is_new:
        registry.add(loading.open_adapters(adapters, vllm_config))
    return vllm_config
