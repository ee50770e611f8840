"""Whether an engine can serve prefixes, and whether a prefix fits its base model."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from peft_prefix_ext.checkpoint.compatibility import (
    LayerShapes,
    StateShape,
    compare_layers,
    compare_states,
    layers_in_words,
)
from peft_prefix_ext.checkpoint.fingerprint import fingerprint
from peft_prefix_ext.checkpoint.format import LayerState, PrefixCheckpoint, PrefixCheckpointError
from vllm_plugin.adapters.base_lora import confuses_slots
from vllm_plugin.adapters.cache_layout import cache_layout, total_num_kv_heads
from vllm_plugin.adapters.rotary import check_rotation
from vllm_plugin.adapters.speculation import lossy_speculation
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.kv_transfer_config import HANDOVER, settings_in
from vllm_plugin.logger import logger

# Fields of the config of models whose queries read only what an indexer selects from a cache of its own: DeepSeek-V3.2
# and GLM-DSA, DeepSeek-V4.
INDEXER = ("index_topk", "compress_ratios")


def check_engine(vllm_config: Any) -> None:
    """Raises `PrefixServeError` if this engine cannot serve prefixes."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    aux_outputs = getattr(vllm_config, "aux_output_config", None)
    hands_over = bool((settings_in(vllm_config.kv_transfer_config) or {}).get(HANDOVER))
    refusals = {
        "pooling models": model.runner_type != "generate",
        "encoder-decoder models": bool(model.is_encoder_decoder),
        "sparse attention with an indexer": any(hasattr(model.hf_text_config, name) for name in INDEXER),
        # vLLM then caches keys and values, and a prefix holds latents.
        "VLLM_MLA_DISABLE=1 with latent attention (MLA)": bool(model.is_deepseek_mla and not model.use_mla),
        "models without attention layers": bool(model.is_attention_free),
        "diffusion models": bool(getattr(model, "is_diffusion", False)),
        "context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--enable-return-routed-experts": bool(getattr(aux_outputs, "enabled", False)),
        # There the server that prefills leaves out the end of the prompt, which may reach into a short prompt's prefix.
        "recurrent layers with the NixlConnector": hands_over and bool(model.is_hybrid),
        "several MTP modules with the NixlConnector": hands_over
        and getattr(vllm_config, "num_prefill_lookahead_tokens", 0) > 1,
    }
    found = [feature for feature, present in refusals.items() if present]
    if (drafts := lossy_speculation(vllm_config.speculative_config)) is not None:
        found.append(drafts)
    if found:
        raise PrefixServeError(f"Prefix adapters do not support {' nor '.join(found)} yet; start without them.")
    _check_events(vllm_config)
    cache_layout(model)
    check_rotation(model)
    if vllm_config.lora_config is not None and confuses_slots():
        logger.warning(
            "This vLLM has a bug on CPU that is fixed in 0.33: with as many LoRA adapters in use as --max-loras allows, "
            "requests without LoRA run with one of them; set --max-loras to one more than there are."
        )
    if not vllm_config.cache_config.enable_prefix_caching:
        logger.warning(
            "Prefix caching is off: every request gets a copy of its prefix of its own; leave it on to share one."
        )


def publishes_events(vllm_config: Any) -> bool:
    """Returns whether an engine publishes KV events."""
    events = vllm_config.kv_events_config
    return events is not None and bool(events.enable_kv_cache_events)


def _check_events(vllm_config: Any) -> None:
    """Raises `PrefixServeError` if another connector would publish placeholders as the text of a prompt.

    Ours rewrites the events of the KV cache. These connectors make their own, with the tokens of the request.
    """
    if not publishes_events(vllm_config):
        return
    for connector in vllm_config.kv_transfer_config.kv_connector_extra_config.get("connectors", ()):
        name, extra = connector.get("kv_connector"), connector.get("kv_connector_extra_config") or {}
        if name == "SimpleCPUOffloadConnector" or extra.get("self_describing_kv_events"):
            raise PrefixServeError(
                f"With --kv-events-config, {name} would publish the placeholders of prefixes as text; use the "
                'OffloadingConnector without "self_describing_kv_events", or publish no events.'
            )


def check_adapter(name: str, checkpoint: PrefixCheckpoint, model: Any) -> None:
    """Raises `PrefixServeError` if a prefix does not fit a model or its context.

    This checks what the model's config says, before the engine starts; `check_shapes` checks the engine's layers. Values are
    checked if they were read.

    Args:
        name: The name of the adapter.
        checkpoint: The prefix.
        model: vLLM's `ModelConfig` of the base model, or of the draft model.
    """
    p = checkpoint.num_virtual_tokens
    if checkpoint.is_encoder_decoder:
        raise PrefixServeError(
            f"Prefix adapter {name!r} is of an encoder-decoder model, which vLLM does not serve; use `PeftModel.generate`."
        )
    try:
        checkpoint.check_base(_fingerprint(model.hf_config))
    except PrefixCheckpointError as error:
        raise PrefixServeError(f"Prefix adapter {name!r}: {error}") from error
    trained_on = checkpoint.base_model_name_or_path
    if trained_on and Path(trained_on).name != Path(model.model).name:
        _warn_of_base(name, trained_on, model.model)
    if checkpoint.largest is not None:
        check_magnitude(name, checkpoint.largest, model.dtype)
    shapes = {(layer.key.shape[0], layer.key.shape[2]) for layer in checkpoint.layers.values()}
    expected = (total_num_kv_heads(model), cache_layout(model).kv_lora_rank or model.get_head_size())
    if len(shapes) == 1 and shapes != {expected}:
        heads, size = shapes.pop()
        raise PrefixServeError(
            f"Prefix adapter {name!r} has {heads} KV heads of size {size}, and vLLM's cache has {expected[0]} of size "
            f"{expected[1]}: it was trained on another base model, or on one whose K/V vLLM keeps in another form, which "
            "cannot be served."
        )
    if not model.is_hybrid:
        check_states(name, checkpoint.state_shapes, ())
    num_layers = model.hf_text_config.num_hidden_layers
    if (last := max([*checkpoint.layers, *checkpoint.states])) >= num_layers:
        raise PrefixServeError(
            f"Prefix adapter {name!r} was trained on another base model: it has a layer {last}, the model has {num_layers} "
            "layers."
        )
    # A request needs at least one prompt token and one output token.
    if p + 2 > model.max_model_len:
        raise PrefixServeError(
            f"Prefix adapter {name!r} has {p} virtual tokens, which leaves no room in a context of "
            f"{model.max_model_len}; raise --max-model-len."
        )


@functools.lru_cache(maxsize=1024)
def _warn_of_base(name: str, trained_on: str, served_on: str) -> None:
    """Warns once: an adapter is checked when it is registered, and when it is read."""
    logger.warning(
        "Prefix adapter %r was trained on %s and is served on %s: the architecture fits, but only the same weights "
        "give the same answers.",
        name,
        trained_on,
        served_on,
    )


# Thousands of adapters of one model are checked. The configs are kept, so that their ids are theirs.
_fingerprints: dict[int, tuple[Any, dict[str, Any]]] = {}


def _fingerprint(config: Any) -> dict[str, Any]:
    known = _fingerprints.get(id(config))
    if known is None:
        if len(_fingerprints) >= 8:
            _fingerprints.clear()
        known = _fingerprints[id(config)] = config, fingerprint(config)
    return known[1]


def check_magnitude(name: str, largest: float, dtype: torch.dtype) -> None:
    """Raises `PrefixServeError` if the largest absolute value of a prefix overflows in the model's dtype."""
    if not torch.tensor(largest, dtype=torch.float64).to(dtype).isfinite():
        raise PrefixServeError(
            f"Prefix adapter {name!r} holds values too large for {str(dtype).removeprefix('torch.')}; start with another --dtype."
        )


def check_shapes(name: str, shapes: LayerShapes, layers: LayerShapes, whole_model: bool = True) -> None:
    """Raises `PrefixServeError` if the layers of a prefix are not the model's layers with a KV cache.

    Args:
        name: The name of the adapter.
        shapes: Its layers.
        layers: The layers of the model.
        whole_model: Whether `layers` are all layers of the model, and not those of one pipeline stage.
    """
    if found := compare_layers(shapes, layers, whole_model=whole_model):
        raise PrefixServeError(
            f"Prefix adapter {name!r} was trained on another base model: {'; '.join(layers_in_words(found))}."
        )


def check_states(
    name: str, shapes: Iterable[StateShape], states: Iterable[StateShape], whole_model: bool = True
) -> None:
    """Raises `PrefixServeError` if the states of a prefix are not those of the model's recurrent layers.

    Args:
        name: The name of the adapter.
        shapes: Its states. Without any, the recurrent layers start from zero, which is right in every model.
        states: The states of the model, see `worker/state_layers.py`.
        whole_model: Whether `states` are those of the whole model, and not of one pipeline stage.
    """
    shapes, states = list(shapes), list(states)
    if not shapes:
        return
    if unverified := sorted({state.kind for state in states} - set(LayerState._fields)):
        raise PrefixServeError(
            f"Prefix adapter {name!r} holds trained states of recurrent layers, and how vLLM keeps those of "
            f"{', '.join(unverified)} was never verified; train a prefix for the attention layers only."
        )
    if found := compare_states(shapes, states, whole_model=whole_model):
        raise PrefixServeError(f"Prefix adapter {name!r} was trained on another base model: {found[0]}.")


def check_served_names(adapters: Iterable[str], served: Iterable[str]) -> None:
    """Raises `PrefixServeError` if an adapter has the name of another model on the server."""
    if taken := sorted(set(adapters) & set(served)):
        raise PrefixServeError(
            f"The prefix adapter name {taken[0]!r} is already the name of a model on this server; choose another name."
        )
