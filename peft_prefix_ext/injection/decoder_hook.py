"""`PrefixDecoderHook`: what happens once per forward pass, before and after the decoder runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from peft_prefix_ext.attention.flash import check_flash_inputs, refuse_paged_cache
from peft_prefix_ext.base_model.attention_implementation import (
    SUPPORTED_IMPLEMENTATIONS,
    attention_implementation,
    uses_flash,
)
from peft_prefix_ext.base_model.cache_argument import find_cache
from peft_prefix_ext.checkpoint.format import LayerKV
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.injection.adapter_selection import AdapterSelection
from peft_prefix_ext.injection.batch import BatchAdapters
from peft_prefix_ext.injection.caller_positions import CallerPositions
from peft_prefix_ext.injection.decode_memo import check_cache_offset
from peft_prefix_ext.injection.dropout import PrefixDropout, draw_kept_tokens
from peft_prefix_ext.injection.forward_context import CONTEXT, PrefixForwardContext
from peft_prefix_ext.injection.gradient_checkpointing import (
    CheckpointReplay,
    require_gradient,
    uses_checkpointing,
    uses_reentrant_checkpointing,
)
from peft_prefix_ext.injection.position_ids import (
    check_num_positions,
    default_positions,
    num_embedded_positions,
    text_positions,
)
from peft_prefix_ext.injection.rank_sync import broadcast_frozen_tensors
from peft_prefix_ext.injection.reparam_output import reparam_output, reparam_state
from peft_prefix_ext.injection.sequences import find_packed_sequences


class PrefixDecoderHook(AdapterSelection):
    """A child of the decoder that shifts positions by p and evaluates the reparameterization once per forward pass.

    The decoder is the innermost module that takes positions and the cache. A hook there works for calls of the task
    model and of the bare decoder alike.

    Args:
        decoder: The decoder.
        enclosing: The models that contain it and take `position_ids`, the outermost first.
    """

    adapter_layer_names = ("prefix_ext_reparam",)

    def __init__(self, decoder: Any, enclosing: Sequence[nn.Module] = ()) -> None:
        super().__init__(decoder.get_input_embeddings().weight.device)
        self.prefix_ext_reparam = nn.ModuleDict()
        self.configs: dict[str, PrefixExtConfig] = {}
        self.layer_names: dict[str, list[str]] = {}  # of the layers that train
        # The attention functions that a prefix was tested with, and the test of any other.
        self.tested_attention = set(SUPPORTED_IMPLEMENTATIONS)
        self.test_attention: Callable[[Any], None] | None = None
        self.shared_kv_layers: list[Any] = []  # the hooks on layers that share K/V
        self.has_states = False  # whether recurrent layers have states
        self._replay: CheckpointReplay | None = None
        self._parameter_names = list(inspect.signature(decoder.forward).parameters)
        self._num_positions = num_embedded_positions(decoder)
        self._broadcast_adapters: set[str] = set()
        self._caller_positions = CallerPositions(enclosing)
        self._handles += [
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, always_call=True),
            *self._caller_positions.handles,
        ]

    def detach(self) -> None:
        """Removes the hooks from the decoder, and from the layers that share K/V."""
        super().detach()
        for layer in self.shared_kv_layers:
            layer.detach()

    @property
    def context(self) -> PrefixForwardContext | None:
        """The forward pass that this thread runs, or ran last."""
        return self._thread_state.context

    def drop_adapter(self, adapter_name: str) -> None:
        super().drop_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        self.layer_names.pop(adapter_name, None)
        self._broadcast_adapters.discard(adapter_name)

    def find_context(self, position_ids: torch.Tensor | None) -> PrefixForwardContext | None:
        """Returns the forward pass that an attention layer belongs to; `None` if it has no prefix.

        A checkpointed layer runs again in the backward pass, when other forward passes may have run in between. Its
        positions, which are the same tensor as before, tell them apart. Models that do not pass positions down to their
        layers can replay the last forward pass only.

        Raises:
            RuntimeError: If the layer is called outside of its decoder's forward, or could belong to either of two passes.
        """
        if self._thread_state.is_bypassed:
            return None
        # Not by the active adapter, which another thread may have changed since this forward pass began.
        context: PrefixForwardContext | None = getattr(position_ids, CONTEXT, None)
        if context is not None:
            return context
        batch = self.batch_adapters
        if batch is None or not batch.adapters:
            return None
        in_backward = torch._C._current_graph_task_id() != -1
        # Read once: another thread may replace it.
        if in_backward and (replay := self._replay) is not None:
            return replay.replayed_context()
        context = self.context
        if context is None or not context.is_running:
            raise RuntimeError(
                "A layer with a prefix was called outside of its decoder's forward; call the whole model."
            )
        return context

    def _before_decoder(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        are_callers_positions = self._caller_positions.take() is not False
        inputs = {**dict(zip(self._parameter_names, args, strict=False)), **kwargs}
        tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        if tokens is None or self._thread_state.is_bypassed:
            return None  # the decoder raises its own error for a call without input
        cache = find_cache(inputs)
        batch = self._resolve_batch(decoder, len(tokens), inputs, cache)
        if batch is None or not batch.adapters:
            return None
        positions = self._shift_positions(tokens, inputs, cache, batch, are_callers_positions)
        text = text_positions(positions, tokens, cache, inputs.get("attention_mask"), batch.shift)
        check_num_positions(text, self._num_positions, batch.num_virtual_tokens)
        self._broadcast_before_training(decoder, batch)
        is_reentrant = self._uses_reentrant_checkpointing(decoder)
        context = self._build_context(decoder, inputs, len(tokens), cache, batch, text, is_reentrant)
        setattr(positions, CONTEXT, context)
        self._thread_state.context = context
        self._prepare_checkpointing(decoder, inputs, context, is_reentrant)
        return (), inputs

    def _resolve_batch(self, decoder: Any, batch_size: int, inputs: dict[str, Any], cache: Any) -> BatchAdapters | None:
        """Returns the prefixes of the rows of this batch, once attention function and cache are known to work with them."""
        batch = self.batch_adapters
        offsets = (0,) * batch_size
        if batch is not None:
            batch = batch.expand_to(batch_size)
            refuse_paged_cache(inputs.get("cache"))
            self._check_attention(decoder)
            offsets = batch.offsets(batch_size)
        self._thread_state.offsets = offsets
        check_cache_offset(cache, offsets)
        return batch

    def _shift_positions(
        self,
        tokens: torch.Tensor,
        inputs: dict[str, Any],
        cache: Any,
        batch: BatchAdapters,
        are_callers_positions: bool,
    ) -> torch.Tensor:
        """Puts positions that count the virtual tokens into `inputs`, if the decoder takes any, and returns them."""
        positions = inputs.get("position_ids")
        if positions is None or (not are_callers_positions and positions.dim() == 2):
            positions = default_positions(tokens, cache, inputs.get("attention_mask"))
        positions = positions + batch.shift
        if "position_ids" in self._parameter_names:
            inputs["position_ids"] = positions
        return positions

    def _broadcast_before_training(self, decoder: Any, batch: BatchAdapters) -> None:
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        for name in set(batch.adapters) - self._broadcast_adapters:
            broadcast_frozen_tensors(decoder, name)
            self._broadcast_adapters.add(name)

    def _uses_reentrant_checkpointing(self, decoder: Any) -> bool:
        is_reentrant = torch.is_grad_enabled() and uses_reentrant_checkpointing(decoder)
        if is_reentrant and self.shared_kv_layers:
            raise ValueError(
                "Reentrant gradient checkpointing loses the gradient of K/V that layers share; use "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        return is_reentrant

    def _build_context(
        self,
        decoder: Any,
        inputs: dict[str, Any],
        batch_size: int,
        cache: Any,
        batch: BatchAdapters,
        positions: torch.Tensor,
        is_reentrant: bool,
    ) -> PrefixForwardContext:
        config = self.configs[batch.adapters[0]]
        context = PrefixForwardContext(
            batch,
            batch_size,
            positions,
            {name: self._reparam_state(name) for name in batch.adapters},
            inputs.get("attention_mask"),
            is_flash=uses_flash(decoder.config),  # in each pass, as `set_attn_implementation` changes it
            dropout=PrefixDropout.draw(config.prefix_dropout) if self.training and config.prefix_dropout else None,
            kept_tokens=draw_kept_tokens(config, positions.device) if self.training and config.token_dropout else None,
            sequences=find_packed_sequences(inputs) if self.has_states else None,
        )
        if context.is_flash:
            check_flash_inputs(cache, inputs, context.positions)
        for name in batch.adapters:
            context.residuals[name] = self._residuals(name, context, cache, is_reentrant)
        return context

    def _reparam_state(self, adapter_name: str) -> Any:
        has_reparam = adapter_name in self.prefix_ext_reparam
        return reparam_state(self.prefix_ext_reparam[adapter_name]) if has_reparam else None  # type: ignore[arg-type]

    def _residuals(
        self, adapter_name: str, context: PrefixForwardContext, cache: Any, is_reentrant: bool
    ) -> dict[str, LayerKV]:
        """Returns what the reparameterization adds to the K/V of each attention module."""
        if adapter_name not in self.prefix_ext_reparam:
            return {}
        mlp: Any = self.prefix_ext_reparam[adapter_name]
        kv, context.projected = reparam_output(
            mlp,
            adapter_name,
            context.reparam_state[adapter_name],
            cache=cache,
            is_decoding=context.is_decoding,
            is_reentrant=is_reentrant,
        )
        return dict(zip(self.layer_names[adapter_name], kv, strict=True))

    def _prepare_checkpointing(
        self, decoder: Any, inputs: dict[str, Any], context: PrefixForwardContext, is_reentrant: bool
    ) -> None:
        if torch.is_grad_enabled() and uses_checkpointing(decoder):
            self._replay = CheckpointReplay.after(self._replay, context)
        if is_reentrant:
            # For this pass only: the embeddings of a model can be replaced.
            embeddings = decoder.get_input_embeddings()
            self._thread_state.embeddings_handle = embeddings.register_forward_hook(
                lambda module, args, output: require_gradient(output, context)
            )
            if inputs.get("inputs_embeds") is not None:
                inputs["inputs_embeds"] = require_gradient(inputs["inputs_embeds"], context)

    def _check_attention(self, decoder: Any) -> None:
        """Tests an attention function that was set after the model got its prefix.

        Raises:
            ValueError: If the output after a prefix differs from that after its text.
        """
        name = attention_implementation(decoder.config)
        if name in self.tested_attention or torch.compiler.is_compiling():
            return
        if self.test_attention is None:
            raise ValueError(
                f"PREFIX_EXT needs attn_implementation 'sdpa' or 'eager' for {type(decoder).__name__}, got {name!r}."
            )
        with self.bypass():
            self.test_attention(decoder)
        self.tested_attention.add(name)

    def _after_decoder(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Mapping) and not self._thread_state.is_bypassed:
            check_cache_offset(find_cache(output), self._thread_state.offsets)  # of a cache that the decoder made
        context = self.context
        if context is not None:
            context.is_running = False
        if self._thread_state.embeddings_handle is not None:
            self._thread_state.embeddings_handle.remove()
            self._thread_state.embeddings_handle = None

    def __getstate__(self) -> dict[str, Any]:
        # The tensors of a forward pass with gradients cannot be copied.
        return {**self.__dict__, "_replay": None}


def decoder_hooks_of(model: nn.Module) -> list[PrefixDecoderHook]:
    """Returns the decoder hooks of a model: one, or one for each stack of an encoder-decoder model."""
    return [module for module in model.modules() if isinstance(module, PrefixDecoderHook)]


@contextmanager
def without_prefixes(model: nn.Module) -> Iterator[None]:
    """Runs `model` without the prefixes that it may have."""
    with ExitStack() as stack:
        for hook in decoder_hooks_of(model):
            stack.enter_context(hook.bypass())
        yield
