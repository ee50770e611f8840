"""What all prefixed layers of a model share: the reparameterization, and which forward pass is under way."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_prefix_ext.attention.flash import KNOWN, attention_of, flash_or_refuse, refuse_paged_cache
from peft_prefix_ext.base_model.cache_argument import cache_in
from peft_prefix_ext.checkpoint.format import LayerKV
from peft_prefix_ext.injection.batch import BASE, BatchAdapters
from peft_prefix_ext.injection.caller_positions import OuterCalls
from peft_prefix_ext.injection.decode_memo import check_cache_offset, memoize_for_decoding
from peft_prefix_ext.injection.dropout import PrefixDropout
from peft_prefix_ext.injection.forward_context import CONTEXT, PrefixForwardContext
from peft_prefix_ext.injection.gradient_checkpointing import (
    CheckpointReplay,
    require_gradient,
    uses_checkpointing,
    uses_reentrant_checkpointing,
)
from peft_prefix_ext.injection.position_ids import check_room, default_positions, num_embedded_positions
from peft_prefix_ext.injection.rank_sync import start_as_first_process
from peft_prefix_ext.injection.thread_state import ThreadState
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer

# Threads that are the first to tell a module of its rows must not both do so.
_TELLING = threading.Lock()


class PrefixDecoderHook(PrefixTunerLayer):
    """A child of the decoder that shifts its positions by p and evaluates the reparameterization once per forward pass.

    The decoder is the innermost module that is given positions and the cache: hooked there, calls to the task model and
    to the bare decoder are served alike.
    """

    adapter_layer_names = ("prefix_ext_reparam",)

    def __init__(self, decoder: Any, around: Sequence[nn.Module] = ()) -> None:
        super().__init__(decoder.get_input_embeddings().weight.device)
        self.prefix_ext_reparam = nn.ModuleDict()
        self.num_virtual_tokens: dict[str, int] = {}
        self.prefix_dropout: dict[str, float] = {}
        self.layer_names: dict[str, list[str]] = {}  # of the layers that train
        # Which attention functions are known to do with a prefix what they do with its text, and what finds out of others.
        self.tested_attention = set(KNOWN)
        self.test_attention: Callable[[Any], None] | None = None
        self._of_thread = ThreadState()
        self._replay: CheckpointReplay | None = None
        self._parameters_of_forward = list(inspect.signature(decoder.forward).parameters)
        self._num_positions = num_embedded_positions(decoder)
        self._told: list[AuxiliaryTrainingWrapper] = []
        self._started: set[str] = set()  # to train
        # What holds the hooks of layers that share the K/V of others.
        self.shared_layers: list[Any] = []
        self._handles = [
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, always_call=True),
        ]
        self._outer_calls = OuterCalls(around)
        self._handles += self._outer_calls.handles

    def add_handle(self, handle: RemovableHandle) -> None:
        """Adds a hook that goes with those on the decoder."""
        self._handles.append(handle)

    def detach(self) -> None:
        """Takes the hooks off the decoder, and off the layers that share K/V."""
        for handle in self._handles:
            handle.remove()
        for layer in self.shared_layers:
            layer.detach()

    @property
    def step(self) -> PrefixForwardContext | None:
        """The forward pass that this thread runs, or ran last."""
        return self._of_thread.step

    @property
    def current_batch(self) -> BatchAdapters | None:
        """The prefixes that the next forward pass of this thread uses, if any."""
        if self._of_thread.is_bypassed or self.disable_adapters or not self.active_adapters:
            return None
        if self._of_thread.mixed is not None:
            return self._of_thread.mixed
        # An encoder need not have a prefix, and there may be adapters of other types beside it.
        name = next((name for name in self.active_adapters if name in self.num_virtual_tokens), None)
        return None if name is None else BatchAdapters((name,), self.num_virtual_tokens[name])

    @contextmanager
    def mixed(self, batch: BatchAdapters) -> Iterator[None]:
        """Gives the rows of this thread's batches these prefixes, whatever adapter is active."""
        self._of_thread.mixed = batch
        try:
            yield
        finally:
            self._of_thread.mixed = None

    def give_rows_to(self, wrapper: AuxiliaryTrainingWrapper) -> None:
        """Sees to it that a module that is saved with adapters, such as a head, is told which one each row has."""
        with _TELLING:
            if wrapper not in self._told:
                self._told.append(wrapper)
                self._handles.append(wrapper.register_forward_pre_hook(self._before_wrapper, with_kwargs=True))

    def _before_wrapper(
        self, wrapper: AuxiliaryTrainingWrapper, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict] | None:
        batch = self.current_batch
        if batch is None or not batch.names:
            return None
        names = batch.of_batch(len(args[0])).names
        own = [name if name in wrapper._adapters else BASE for name in names]
        return args, {**kwargs, "adapter_names": own}

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Lets this thread run the base model alone, without a touch to any parameter's `requires_grad`."""
        before, self._of_thread.is_bypassed = self._of_thread.is_bypassed, True
        try:
            yield
        finally:
            self._of_thread.is_bypassed = before

    def delete_adapter(self, adapter_name: str) -> None:
        self.forget(adapter_name)
        super().delete_adapter(adapter_name)

    def _all_available_adapter_names(self) -> list[str]:
        # Not every adapter has a reparameterization; the next active one is chosen among them all.
        return sorted(self.num_virtual_tokens)

    def forget(self, adapter_name: str) -> None:
        """Drops what is known of an adapter besides its parameters."""
        super().forget(adapter_name)
        self.num_virtual_tokens.pop(adapter_name, None)
        self.prefix_dropout.pop(adapter_name, None)
        self.layer_names.pop(adapter_name, None)
        self._started.discard(adapter_name)

    def context_of(self, position_ids: torch.Tensor | None) -> PrefixForwardContext | None:
        """Returns the forward pass that an attention layer with these positions belongs to; `None` for one without prefix.

        A checkpointed layer runs again in the backward pass, when other forward passes may have come in between: the
        positions, which it is given again, tell. Where a model does not hand them down there may be only one.
        """
        batch = self.current_batch
        if batch is None or not batch.adapters:
            return None
        step: PrefixForwardContext | None = getattr(position_ids, CONTEXT, None)
        if step is not None:
            return step
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and (replay := self._replay) is not None:
            return replay.replayed_context()
        step = self.step
        if step is None or not step.running:
            raise RuntimeError(
                "A layer with a prefix was called outside of its decoder's forward; call the whole model."
            )
        return step

    def _before_decoder(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        gave_positions = self._outer_calls.gave_positions()
        kwargs = {**dict(zip(self._parameters_of_forward, args, strict=False)), **kwargs}
        new = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if new is None or self._of_thread.is_bypassed:
            return None  # the decoder has its own words for a call without input
        cache, batch = cache_in(kwargs), self.current_batch
        batch = batch and batch.of_batch(len(new))
        if batch is not None:
            refuse_paged_cache(kwargs.get("cache"))
            self._check_attention(decoder)
        self._of_thread.offsets = batch.offsets(len(new)) if batch is not None else (0,) * len(new)
        check_cache_offset(cache, self._of_thread.offsets)
        if batch is None or not batch.adapters:
            return None
        positions = kwargs.get("position_ids")
        if positions is None or (gave_positions is False and positions.dim() == 2):
            positions = default_positions(new, cache, kwargs.get("attention_mask"))
        positions = positions + batch.shift
        if "position_ids" in self._parameters_of_forward:
            kwargs["position_ids"] = positions
        # Multimodal rotary embeddings have a leading axis; its first entry counts the text.
        text_positions = positions[0] if positions.dim() == 3 else positions.view_as(positions)
        check_room(text_positions, self._num_positions, batch.num_virtual_tokens)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for name in set(batch.adapters) - self._started:
                start_as_first_process(decoder, name)
                self._started.add(name)
        is_reentrant = torch.is_grad_enabled() and uses_reentrant_checkpointing(decoder)
        if is_reentrant and self.shared_layers:
            raise ValueError(
                "Reentrant gradient checkpointing loses the gradient of K/V that layers share; use "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        rate = self.prefix_dropout[batch.adapters[0]] if self.training else 0.0
        dropout = PrefixDropout.draw(rate) if rate else None
        states = {name: self._state_of(name) for name in batch.adapters}
        is_flash = flash_or_refuse(decoder.config, kwargs, text_positions)
        step = PrefixForwardContext(
            batch, text_positions, states, kwargs.get("attention_mask"), is_flash=is_flash, dropout=dropout
        )
        for name in batch.adapters:
            step.residuals[name], step.projected = self._residuals(step, name, is_reentrant, cache)
        self._of_thread.step = step
        setattr(positions, CONTEXT, step)
        if torch.is_grad_enabled() and uses_checkpointing(decoder):
            self._replay = CheckpointReplay.of(step, self._replay)
        if is_reentrant:
            # Not for good: the embeddings of a model can be replaced.
            embeddings = decoder.get_input_embeddings()
            self._of_thread.embeddings_handle = embeddings.register_forward_hook(
                lambda module, args, output: require_gradient(output, step)
            )
            if kwargs.get("inputs_embeds") is not None:
                kwargs["inputs_embeds"] = require_gradient(kwargs["inputs_embeds"], step)
        return (), kwargs

    def _check_attention(self, decoder: Any) -> None:
        """Tests an attention function that the model was told to use after it got its prefix.

        Raises:
            ValueError: If a prefix does not do with it what its text does.
        """
        attention = attention_of(decoder.config)
        if attention in self.tested_attention or torch.compiler.is_compiling():
            return
        if self.test_attention is None:
            raise ValueError(
                f"PREFIX_EXT needs attn_implementation 'sdpa' or 'eager' for {type(decoder).__name__}, got {attention!r}."
            )
        with self.bypassed():
            self.test_attention(decoder)
        self.tested_attention.add(attention)

    def _after_decoder(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Mapping) and not self._of_thread.is_bypassed:
            check_cache_offset(cache_in(output), self._of_thread.offsets)  # of a cache that was made on the way
        step = self.step
        if step is not None:
            step.running = False
        if self._of_thread.embeddings_handle is not None:
            self._of_thread.embeddings_handle.remove()
            self._of_thread.embeddings_handle = None

    def _state_of(self, adapter: str) -> Any:
        """Returns what the residuals of an adapter depend on.

        Versions change with every in-place write, as by an optimizer or by `load_state_dict`.
        """
        if adapter not in self.prefix_ext_reparam or torch.compiler.is_compiling():  # a graph cannot look at versions
            return None
        parameters = list(self.prefix_ext_reparam[adapter].parameters())
        return torch.is_autocast_enabled(parameters[0].device.type), [parameter._version for parameter in parameters]

    def _residuals(
        self, step: PrefixForwardContext, adapter: str, is_reentrant: bool, cache: Any
    ) -> tuple[dict[str, LayerKV], tuple[torch.Tensor, torch.Tensor] | None]:
        if adapter not in self.prefix_ext_reparam:
            return {}, None
        mlp: Any = self.prefix_ext_reparam[adapter]
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in mlp.parameters()):
            if is_reentrant:
                return self._cut_off(adapter, mlp)
            return self._by_layer(adapter, mlp()), None
        if mlp.training or torch.compiler.is_compiling():
            return self._by_layer(adapter, mlp()), None
        with torch.no_grad():
            states = memoize_for_decoding(
                cache, adapter, step.states[adapter], step.is_decoding, lambda: self._by_layer(adapter, mlp())
            )
        return states, None

    @torch.compiler.disable  # a compiled graph could not be walked back layer by layer
    def _cut_off(self, adapter: str, mlp: Any) -> tuple[dict[str, LayerKV], tuple[torch.Tensor, torch.Tensor]]:
        projected = mlp(is_split=False)
        leaf = projected.detach().requires_grad_()
        return self._by_layer(adapter, mlp.split(leaf)), (leaf, projected)

    def __getstate__(self) -> dict[str, Any]:
        # What autograd recorded cannot be copied.
        return {**self.__dict__, "_replay": None}

    def _by_layer(self, adapter: str, states: list[LayerKV]) -> dict[str, LayerKV]:
        return dict(zip(self.layer_names[adapter], states, strict=True))


def decoder_hooks_of(model: nn.Module) -> list[PrefixDecoderHook]:
    """Returns the runtimes in a model: one, or those of an encoder-decoder model's stacks."""
    return [module for module in model.modules() if isinstance(module, PrefixDecoderHook)]


@contextmanager
def without_prefixes(model: nn.Module) -> Iterator[None]:
    """Runs `model` without the prefixes that it may have already."""
    with ExitStack() as stack:
        for runtime in decoder_hooks_of(model):
            stack.enter_context(runtime.bypassed())
        yield
