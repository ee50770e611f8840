"""From parsed options to an engine config whose adapters are checked and registered."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm_plugin.adapters.loading import register_adapters
from vllm_plugin.adapters.options import AdapterOption, check_name, check_unique
from vllm_plugin.adapters.registry import make_folder, registry_at
from vllm_plugin.adapters.remote import use_cache
from vllm_plugin.adapters.sources import check_folders, check_owners
from vllm_plugin.adapters.speculation import warn_of_drafts
from vllm_plugin.adapters.validation import check_engine, check_served_names
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.front_end.cli_args import OPTIONS
from vllm_plugin.front_end.cpu_cores import keep_cores
from vllm_plugin.front_end.lora_options import resolver_folders, resolver_repositories, switches_on
from vllm_plugin.kv_transfer_config import (
    ADAPTERS,
    CACHE_SIZE,
    DEVICE_MEMORY,
    FOLDERS,
    OWNERS,
    PINNED,
    REGISTRY,
    WARMUP,
    merge,
    replace_settings,
    settings,
    settings_in,
)


def configure(kv_transfer_config: Any, options: Namespace) -> Any:
    """Returns the `KVTransferConfig` of a server with prefixes.

    The first process of the server creates the registry and adds its folder to the options, which vLLM passes on to the
    other processes.

    Args:
        kv_transfer_config: The operator's own, if any.
        options: The parsed options.

    Raises:
        PrefixServeError: If two adapters, or an adapter and a LoRA module, have the same name, or a folder does not exist.
    """
    adapters = options.prefix_adapter or []
    folders, owners = options.prefix_adapter_dir or [], options.prefix_adapter_hub or []
    if not (adapters or folders or owners or options.enable_prefix_adapters):
        given = next(option for option in OPTIONS if getattr(options, option) not in (None, False))
        raise PrefixServeError(
            f"--{given.replace('_', '-')} needs --prefix-adapter, --prefix-adapter-dir, --prefix-adapter-hub or "
            "--enable-prefix-adapters."
        )
    check_folders(folders)
    check_owners(owners)
    check_unique(adapters)
    modules = getattr(options, "lora_modules", None) or []
    check_served_names([adapter.name for adapter in adapters], [module.name for module in modules])
    if getattr(options, "prefix_registry", None) is None:
        options.prefix_registry = make_folder()
    names = options.prefix_adapter_warmup
    more = {
        REGISTRY: str(options.prefix_registry),
        # Without names, all.
        WARMUP: True if names == [] else names or False,
        FOLDERS: [*folders, *(folder for folder in resolver_folders() if folder not in folders)],
        OWNERS: [*owners, *(name for name in resolver_repositories() if name not in owners)],
        DEVICE_MEMORY: options.prefix_adapter_device_memory,
        CACHE_SIZE: options.prefix_adapter_cache_size,
        PINNED: options.prefix_adapter_pinned,
    }
    more = {name: value for name, value in more.items() if value not in (None, [])}
    may_come_later = FOLDERS in more or OWNERS in more or options.enable_prefix_adapters or bool(switches_on())
    _check_pinned(options.prefix_adapter_pinned or (), None if may_come_later else [each.name for each in adapters])
    return merge(kv_transfer_config, settings((adapter._asdict() for adapter in adapters), **more))


def _check_pinned(names: Iterable[str], known: Sequence[str] | None) -> None:
    """Raises `PrefixServeError` if no adapter can have one of these names. `known` is None if others may come later."""
    for name in names:
        check_name(name)
        if known is not None and name not in known:
            raise PrefixServeError(
                f"--prefix-adapter-pinned names {name!r}, and there is no such adapter; this server has: {', '.join(known)}."
            )


def create(engine_args: Any, create_engine_config: Callable[[], Any]) -> Any:
    """Creates the config of an engine with prefixes.

    Args:
        engine_args: vLLM's `EngineArgs`, whose `kv_transfer_config` has our connector.
        create_engine_config: vLLM's own method.

    Raises:
        PrefixServeError: If the engine cannot serve prefixes, or not one of these.
    """
    if getattr(engine_args, "kv_offloading_size", None) is not None:
        raise PrefixServeError(
            "--kv-offloading-size replaces the KV connector of the prefix adapters; name the OffloadingConnector in "
            "--kv-transfer-config instead."
        )
    ours = dict(settings_in(engine_args.kv_transfer_config) or {})
    adapters = [AdapterOption(**fields) for fields in ours.pop(ADAPTERS, [])]
    served = engine_args.served_model_name or [engine_args.model]
    check_served_names([adapter.name for adapter in adapters], [served] if isinstance(served, str) else served)
    ours[REGISTRY] = ours.get(REGISTRY) or make_folder()
    registry = registry_at(ours[REGISTRY])
    use_cache(ours.get(CACHE_SIZE))
    engine_args.kv_transfer_config = replace_settings(engine_args.kv_transfer_config, ours)
    vllm_config = create_engine_config()
    _keep_embeddings_out(engine_args, vllm_config)
    check_engine(vllm_config)
    keep_cores(vllm_config)
    # Otherwise another process of this server has added them.
    if registry.is_new:
        registered = register_adapters(adapters, vllm_config)
        registry.add(registered)
        warn_of_drafts((adapter.spec for adapter in registered), vllm_config)
    return vllm_config


def _keep_embeddings_out(engine_args: Any, vllm_config: Any) -> None:
    """Makes the server refuse embeddings of media from clients, as without prefixes, unless the operator wants them.

    vLLM takes every KV consumer for the second half of a disaggregated server, whose first half has checked and run the
    request. So it accepts embeddings from clients there, also without the tensors, which can crash an engine that runs
    the request itself.
    """
    media = vllm_config.model_config.multimodal_config
    if media is None or vllm_config.ec_transfer_config is not None:
        return
    media.allow_missing_mm_embeddings = False
    media.enable_mm_embeds = bool(engine_args.enable_mm_embeds)
