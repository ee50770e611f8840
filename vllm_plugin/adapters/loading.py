"""From an adapter's name on the command line to a checked prefix: where it lies, what it holds, whether it fits."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from peft_prefix_ext.checkpoint.fingerprint import fingerprint
from peft_prefix_ext.checkpoint.format import (
    PrefixCheckpoint,
    PrefixCheckpointError,
    PrefixNotFoundError,
    magnitude,
)
from peft_prefix_ext.checkpoint.hub import resolve
from peft_prefix_ext.checkpoint.reader import read_prefix
from vllm_plugin.adapters.adapter_kinds import holds_lora
from vllm_plugin.adapters.base_lora import confuses_slots, find_base_lora
from vllm_plugin.adapters.registry import Adapter, Shapes
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.errors import AdapterNotFoundError, PrefixServeError
from vllm_plugin.front_end import logits_processors
from vllm_plugin.front_end.cli_args import AdapterOption

# A child of vLLM's logger, which is the one its servers show.
logger = logging.getLogger("vllm.prefix_adapters")


def load(name: str, source: str) -> PrefixCheckpoint:
    """Reads and checks one adapter.

    Raises:
        PrefixServeError: In one sentence, naming the adapter.
    """
    try:
        return read_prefix(resolve(source))
    except PrefixCheckpointError as error:
        kind = AdapterNotFoundError if isinstance(error, PrefixNotFoundError) else PrefixServeError
        told = f"Prefix adapter {name!r}: {error}"
        if holds_lora(source):
            told = (
                f"{told.rstrip('.')}; a LoRA is served with --enable-lora --lora-modules NAME=PATH, at run time by POST "
                "/v1/load_lora_adapter, and offline with a `LoRARequest`."
            )
        raise kind(told) from error


def open_adapters(options: Iterable[AdapterOption], vllm_config: Any) -> list[Adapter]:
    """Reads and checks adapters, a few at a time: there may be thousands, and no tensor is kept.

    Raises:
        PrefixServeError: If one of them cannot be served.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda option: open_adapter(option, vllm_config), options))


def open_adapter(option: AdapterOption, vllm_config: Any, layers: Shapes | None = None) -> Adapter:
    """Reads one adapter and checks that this engine can serve it.

    Args:
        layers: The shapes of the engine's real layers, if it has started.

    Raises:
        PrefixServeError: In one sentence, naming the adapter.
    """
    try:
        return _open_adapter(option, vllm_config, layers)
    except PrefixServeError:
        raise
    except Exception as error:
        # Anything may be in these files, and no list of what that breaks is complete.
        raise PrefixServeError(
            f"Prefix adapter {option.name!r}: {option.path} is malformed ({type(error).__name__}: {error}); copy it again."
        ) from error


def _open_adapter(option: AdapterOption, vllm_config: Any, layers: Shapes | None) -> Adapter:
    name = option.name
    checkpoint = load(name, option.path)
    check_adapter(name, checkpoint, vllm_config)
    shapes = tuple(
        (index, layer.key.shape[0], layer.key.shape[2], layer.value.shape[2])
        for index, layer in sorted(checkpoint.layers.items())
    )
    if layers is not None:
        check_shapes(name, shapes, layers)
    spec = PrefixSpec(
        name=name,
        source=option.path,
        # Where a link points to now: what it points to later is another adapter.
        path=str(checkpoint.path.resolve()),
        num_virtual_tokens=checkpoint.num_virtual_tokens,
        digest=digest_of(checkpoint),
        **find_base_lora(name, checkpoint, vllm_config),
    )
    return Adapter(spec, option.base_model_name, shapes)


def reload(spec: PrefixSpec) -> PrefixCheckpoint:
    """Reads the tensors of a prefix again, in a worker.

    Raises:
        PrefixServeError: If the file is no longer the one that requests name.
    """
    checkpoint = load(spec.name, spec.path)
    if digest_of(checkpoint) != spec.digest:
        raise PrefixServeError(
            f"The weights of prefix adapter {spec.name!r} in {spec.path} are no longer those it was loaded with; load it "
            'again, in place of itself: on a server by POST /v1/load_prefix_adapter with "load_inplace": true, offline by a '
            "request with `load_inplace=True`."
        )
    return checkpoint


def digest_of(checkpoint: PrefixCheckpoint) -> str:
    """Returns the SHA-256, in hex, of all that makes a prefix: its weights, and the config that says what they are."""
    config = json.dumps(checkpoint.config, sort_keys=True)
    return hashlib.sha256(f"{checkpoint.digest} {config}".encode()).hexdigest()


def check_engine(vllm_config: Any) -> None:
    """Raises `PrefixServeError` if this engine cannot serve any prefix."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    aux_outputs = getattr(vllm_config, "aux_output_config", None)
    refusals = {
        "pooling models": model.runner_type != "generate",
        "encoder-decoder models": bool(model.is_encoder_decoder),
        "multi-head latent attention (MLA)": bool(model.use_mla),
        "models with Mamba or linear-attention layers": bool(
            model.is_hybrid or model.is_attention_free or model.has_inner_state
        ),
        # The role of our connector would have the server accept embeddings from clients, which can crash the engine.
        "multimodal models": bool(model.is_multimodal_model),
        "diffusion models": bool(getattr(model, "is_diffusion", False)),
        "context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        # What a draft model keeps of the prefix nobody fills in. N-grams are guessed from token ids alone, and checked.
        "speculative decoding other than by n-grams": getattr(vllm_config.speculative_config, "method", "ngram")
        != "ngram",
        "--enable-return-routed-experts": bool(getattr(aux_outputs, "enabled", False)),
    }
    found = [what for what, present in refusals.items() if present]
    if (processors := logits_processors.unsupported(vllm_config)) is not None:
        found.append(processors)
    if found:
        raise PrefixServeError(f"Prefix adapters do not support {' nor '.join(found)} yet; start without them.")
    if vllm_config.lora_config is not None and confuses_slots():
        logger.warning(
            "This vLLM has a defect on CPU that 0.33 has not: with as many LoRA adapters in use as --max-loras says, "
            "requests without LoRA are answered with one; set it to one more than there are."
        )
    if not vllm_config.cache_config.enable_prefix_caching:
        logger.warning(
            "Prefix caching is off: every request gets a copy of its prefix of its own; leave it on to share one."
        )


def check_adapter(name: str, checkpoint: PrefixCheckpoint, vllm_config: Any) -> None:
    """Raises `PrefixServeError` if a prefix was not made for this engine's base model or leaves no room in it.

    What the config of a model tells is checked here, before the engine starts; `geometry.py` checks the real layers.
    """
    model = vllm_config.model_config
    p = checkpoint.num_virtual_tokens
    if checkpoint.is_encoder_decoder:
        raise PrefixServeError(
            f"Prefix adapter {name!r} is of an encoder-decoder model, which vLLM does not serve; use `PeftModel.generate`."
        )
    try:
        checkpoint.check_base(fingerprint(model.hf_config))
    except PrefixCheckpointError as error:
        raise PrefixServeError(f"Prefix adapter {name!r}: {error}") from error
    trained_on = checkpoint.base_model_name_or_path
    if trained_on and Path(trained_on).name != Path(model.model).name:
        logger.warning(
            "Prefix adapter %r was trained on %s and is served on %s: the architecture fits, but only the same weights "
            "give the same answers.",
            name,
            trained_on,
            model.model,
        )
    largest = max(magnitude(tensor) for layer in checkpoint.layers.values() for tensor in layer)
    if not torch.tensor(largest, dtype=torch.float64).to(model.dtype).isfinite():
        raise PrefixServeError(
            f"Prefix adapter {name!r} holds values too large for {str(model.dtype).removeprefix('torch.')}; start with "
            "another --dtype."
        )
    shapes = {(layer.key.shape[0], layer.key.shape[2]) for layer in checkpoint.layers.values()}
    expected = (model.get_total_num_kv_heads(), model.get_head_size())
    if len(shapes) == 1 and shapes != {expected}:
        heads, size = shapes.pop()
        raise PrefixServeError(
            f"Prefix adapter {name!r} has {heads} KV heads of size {size}, and vLLM's cache has {expected[0]} of size "
            f"{expected[1]}: it was trained on another base model, or on one whose K/V vLLM keeps in another form, which "
            "cannot be served."
        )
    num_layers = model.hf_text_config.num_hidden_layers
    if max(checkpoint.layers) >= num_layers:
        raise PrefixServeError(
            f"Prefix adapter {name!r} was trained on another base model: it has a layer {max(checkpoint.layers)}, the "
            f"model has {num_layers} layers."
        )
    # One prompt token and one output token are the least a request needs.
    if p + 2 > model.max_model_len:
        raise PrefixServeError(
            f"Prefix adapter {name!r} has {p} virtual tokens, which leaves no room in a context of "
            f"{model.max_model_len}; raise --max-model-len."
        )


def check_shapes(name: str, shapes: Shapes, layers: Shapes, whole_model: bool = True) -> None:
    """Raises `PrefixServeError` if the layers of a prefix are not those of the model that have a KV cache.

    Args:
        whole_model: Whether `layers` are all of them, and not those of one pipeline stage.
    """
    if not whole_model:
        shapes = tuple(row for row in shapes if row[0] in {index for index, *_ in layers})
    ours, theirs = ({index: tuple(shape) for index, *shape in rows} for rows in (shapes, layers))
    if ours.keys() != theirs.keys():
        raise PrefixServeError(
            f"Prefix adapter {name!r} was trained on another base model: the layers with a KV cache differ (without a "
            f"prefix: {sorted(theirs.keys() - ours.keys())}, without a cache: {sorted(ours.keys() - theirs.keys())})."
        )
    for index, shape in ours.items():
        if shape != theirs[index]:
            raise PrefixServeError(
                f"Prefix adapter {name!r} was trained on another base model: layer {index} has {shape[0]} KV heads of "
                f"sizes {shape[1:]}, the model has {theirs[index][0]} of sizes {theirs[index][1:]}."
            )


def check_served_names(adapters: Iterable[str], served: Iterable[str]) -> None:
    """Raises `PrefixServeError` if an adapter has a name that the server already answers to."""
    if taken := sorted(set(adapters) & set(served)):
        raise PrefixServeError(
            f"The prefix adapter name {taken[0]!r} is already the name of a model on this server; choose another name."
        )
