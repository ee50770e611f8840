"""What all prefixed layers of a model share: the reparameterization, and which forward pass is under way."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_prefix_ext.checkpoint import LayerKV
from peft_prefix_ext.dropout import PrefixDropout
from peft_prefix_ext.flash import flash_or_refuse
from peft_prefix_ext.memo import check_behind, remembered
from peft_prefix_ext.reentrant import gather_gradient, uses_checkpointing, uses_reentrant_checkpointing
from peft_prefix_ext.rows import Rows
from peft_prefix_ext.step import STEP, Step
from peft_prefix_ext.tuner_layer import PrefixTunerLayer


class PrefixRuntime(PrefixTunerLayer):
    """A child of the decoder that shifts its positions by p and evaluates the reparameterization once per forward pass.

    The decoder is the innermost module that is given positions and the cache: hooked there, calls to the task model and
    to the bare decoder are served alike.
    """

    adapter_layer_names = ("prefix_ext_reparam",)

    def __init__(self, decoder: Any) -> None:
        super().__init__(decoder.get_input_embeddings().weight.device)
        self.prefix_ext_reparam = nn.ModuleDict()
        self.num_virtual_tokens: dict[str, int] = {}
        self.prefix_dropout: dict[str, float] = {}
        self.layer_names: dict[str, list[str]] = {}  # of the layers that train
        self.step: Step | None = None
        self._last_with_gradient: Step | None = None
        self._is_ambiguous = self._was_replayed = False
        self._bypassed = False
        self._behind: Hashable = 0  # what the tokens of the forward pass under way stand behind
        self._mixed: Rows | None = None
        self._parameters_of_forward = list(inspect.signature(decoder.forward).parameters)
        self._num_positions = _num_embedded_positions(decoder)
        # What holds the hooks of layers that share the K/V of others.
        self.shared_layers: list[Any] = []
        self._handles = [
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, always_call=True),
        ]
        self._embeddings_handle: RemovableHandle | None = None

    def detach(self) -> None:
        """Takes the hooks off the decoder, and off the layers that share K/V."""
        for handle in self._handles:
            handle.remove()
        for layer in self.shared_layers:
            layer.detach()

    @property
    def current_rows(self) -> Rows | None:
        """The prefixes that the next forward pass uses, if any."""
        if self._bypassed or self.disable_adapters or not self.active_adapters:
            return None
        if self._mixed is not None:
            return self._mixed
        # An encoder need not have a prefix, and there may be adapters of other types beside it.
        name = next((name for name in self.active_adapters if name in self.num_virtual_tokens), None)
        return None if name is None else Rows((name,), self.num_virtual_tokens[name])

    @contextmanager
    def mixed(self, rows: Rows) -> Iterator[None]:
        """Gives the rows of a batch these prefixes, whatever adapter is active."""
        self._mixed = rows
        try:
            yield
        finally:
            self._mixed = None

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Runs the base model alone, without a touch to any parameter's `requires_grad`."""
        before, self._bypassed = self._bypassed, True
        try:
            yield
        finally:
            self._bypassed = before

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

    def step_of(self, position_ids: torch.Tensor | None) -> Step | None:
        """Returns the forward pass that an attention layer with these positions belongs to; `None` for one without prefix.

        A checkpointed layer runs again in the backward pass, when other forward passes may have come in between: the
        positions, which it is given again, tell. Where a model does not hand them down there may be only one.
        """
        rows = self.current_rows
        if rows is None or not rows.adapters:
            return None
        step: Step | None = getattr(position_ids, STEP, None)
        if step is not None:
            return step
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and self._last_with_gradient is not None:
            if self._is_ambiguous:
                raise RuntimeError(
                    "Under gradient checkpointing this model needs a backward pass after each forward pass with a prefix."
                )
            self._was_replayed = True
            return self._last_with_gradient
        if self.step is None or not self.step.running:
            raise RuntimeError(
                "A layer with a prefix was called outside of its decoder's forward; call the whole model."
            )
        return self.step

    def _before_decoder(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        rows = self.current_rows
        if rows is None:
            self._behind = 0
            check_behind(kwargs.get("past_key_values"), self._behind)
            return None
        kwargs = {**dict(zip(self._parameters_of_forward, args, strict=False)), **kwargs}
        new = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if new is None:
            return None  # the decoder has its own words for a call without input
        rows = rows.of_batch(len(new))
        self._behind = rows.num_virtual_tokens if rows.lengths is None else rows.adapters
        check_behind(kwargs.get("past_key_values"), self._behind)
        if not rows.adapters:
            return None
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = _default_positions(new, kwargs.get("past_key_values"), kwargs.get("attention_mask"))
        positions = positions + rows.shift
        if "position_ids" in self._parameters_of_forward:
            kwargs["position_ids"] = positions
        # Multimodal rotary embeddings have a leading axis; its first entry counts the text.
        text_positions = positions[0] if positions.dim() == 3 else positions.view_as(positions)
        self._check_room(text_positions, rows)
        is_reentrant = torch.is_grad_enabled() and uses_reentrant_checkpointing(decoder)
        if is_reentrant and self.shared_layers:
            raise ValueError(
                "Reentrant gradient checkpointing loses the gradient of K/V that layers share; use "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        rate = self.prefix_dropout[rows.adapters[0]] if self.training else 0.0
        dropout = PrefixDropout.draw(rate) if rate else None
        states = {name: self._state_of(name) for name in rows.adapters}
        is_flash = flash_or_refuse(decoder.config, kwargs, text_positions)
        self.step = Step(rows, text_positions, states, kwargs.get("attention_mask"), is_flash=is_flash, dropout=dropout)
        for name in rows.adapters:
            cache = kwargs.get("past_key_values")
            self.step.residuals[name], self.step.projected = self._residuals(self.step, name, is_reentrant, cache)
        setattr(positions, STEP, self.step)
        if torch.is_grad_enabled() and uses_checkpointing(decoder):
            self._is_ambiguous = self._last_with_gradient is not None and not self._was_replayed
            self._last_with_gradient, self._was_replayed = self.step, False
        if is_reentrant:
            # Not for good: the embeddings of a model can be replaced.
            embeddings = decoder.get_input_embeddings()
            self._embeddings_handle = embeddings.register_forward_hook(
                lambda module, args, output: self._require_gradient(output)
            )
            if kwargs.get("inputs_embeds") is not None:
                kwargs["inputs_embeds"] = self._require_gradient(kwargs["inputs_embeds"])
        return (), kwargs

    def _check_room(self, positions: torch.Tensor, rows: Rows) -> None:
        if self._num_positions is None or torch.compiler.is_compiling():
            return
        if (last := int(positions.max())) >= self._num_positions:
            raise ValueError(
                f"The text ends at position {last}, behind {rows.num_virtual_tokens} virtual tokens, and the model has "
                f"{self._num_positions} positions: shorten it."
            )

    def _after_decoder(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        check_behind(getattr(output, "past_key_values", None), self._behind)  # of a cache that was made on the way
        if self.step is not None:
            self.step.running = False
        if self._embeddings_handle is not None:
            self._embeddings_handle.remove()
            self._embeddings_handle = None

    def _require_gradient(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Reentrant checkpointing drops the gradient of everything behind inputs that do not require one."""
        if self.step is not None and self.step.projected is not None:
            return gather_gradient(embeddings, *self.step.projected)
        return embeddings if embeddings.requires_grad else embeddings.detach().requires_grad_()

    def _state_of(self, adapter: str) -> Any:
        """Returns what the residuals of an adapter depend on.

        Versions change with every in-place write, as by an optimizer or by `load_state_dict`.
        """
        if adapter not in self.prefix_ext_reparam or torch.compiler.is_compiling():  # a graph cannot look at versions
            return None
        parameters = list(self.prefix_ext_reparam[adapter].parameters())
        return torch.is_autocast_enabled(parameters[0].device.type), [parameter._version for parameter in parameters]

    def _residuals(
        self, step: Step, adapter: str, is_reentrant: bool, cache: Any
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
            states = remembered(
                cache, adapter, step.states[adapter], step.is_decoding, lambda: self._by_layer(adapter, mlp())
            )
        return states, None

    @torch.compiler.disable  # a compiled graph could not be walked back layer by layer
    def _cut_off(self, adapter: str, mlp: Any) -> tuple[dict[str, LayerKV], tuple[torch.Tensor, torch.Tensor]]:
        projected = mlp.project()
        leaf = projected.detach().requires_grad_()
        return self._by_layer(adapter, mlp.split(leaf)), (leaf, projected)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no forward pass under way, and what autograd recorded cannot be copied.
        return {**self.__dict__, "step": None, "_last_with_gradient": None}

    def _by_layer(self, adapter: str, states: list[LayerKV]) -> dict[str, LayerKV]:
        return dict(zip(self.layer_names[adapter], states, strict=True))


def runtimes_of(model: nn.Module) -> list[PrefixRuntime]:
    """Returns the runtimes in a model: one, or those of an encoder-decoder model's stacks."""
    return [module for module in model.modules() if isinstance(module, PrefixRuntime)]


def _num_embedded_positions(decoder: nn.Module) -> int | None:
    """Returns how many positions a decoder has learned embeddings for; `None` where they are told otherwise."""
    for name in ("wpe", "embed_positions"):
        embedding = getattr(decoder, name, None)
        if isinstance(embedding, nn.Embedding):
            return int(embedding.num_embeddings - getattr(embedding, "offset", 0))
    return None


def _default_positions(new: torch.Tensor, cache: Any, mask: Any) -> torch.Tensor:
    """Returns the positions, `[b or 1, q]`, of a call that gives none.

    Padding does not count, wherever it is: real tokens start right behind the prefix.
    """
    num_new = new.shape[1]
    past = int(cache.get_seq_length()) if cache is not None else 0
    # A mask may also come ready-made, of four dimensions or one for each kind of layer.
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] == past + num_new:
        return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, past:]
    return (torch.arange(num_new, device=new.device) + past)[None]


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Runs `model` without the prefixes that it may have already."""
    with ExitStack() as stack:
        for runtime in runtimes_of(model):
            stack.enter_context(runtime.bypassed())
        yield
