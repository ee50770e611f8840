"""What all prefixed layers of a model share: the reparameterization, and the state of one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peft_prefix_ext.checkpoint import LayerKV
from peft_prefix_ext.mask import prepend_prefix
from peft_prefix_ext.reentrant import gather_gradient, uses_reentrant_checkpointing
from peft_prefix_ext.tuner_layer import PrefixTunerLayer

# The attribute of a forward pass' positions that holds its `Step`.
STEP = "_prefix_ext_step"


@dataclass
class Step:
    """One forward pass of the decoder with a prefix.

    Args:
        adapter: The active adapter.
        num_virtual_tokens: p.
        positions: The positions of the new tokens, `[b or 1, q]`, counted from the first virtual token.
        residuals: What the reparameterization adds to the K/V of each layer, by layer index; empty without one.
        is_reentrant: Whether the layers are under reentrant gradient checkpointing.
        projected: The leaf that the residuals are part of and the reparameterization's output that awaits its gradient,
            under reentrant gradient checkpointing only.
        running: Whether the forward pass is under way.
    """

    adapter: str
    num_virtual_tokens: int
    positions: torch.Tensor
    residuals: dict[int, LayerKV]
    is_reentrant: bool = False
    projected: tuple[torch.Tensor, torch.Tensor] | None = None
    running: bool = True
    _masks: dict[int | None, tuple[torch.Tensor | None, torch.Tensor | None]] = field(default_factory=dict)

    def mask(self, mask: torch.Tensor | None, kv_length: int, sliding_window: int | None) -> torch.Tensor | None:
        """Returns `prepend_prefix(...)`, computed once for all layers that were given the same mask."""
        if sliding_window not in self._masks or self._masks[sliding_window][0] is not mask:
            extended = prepend_prefix(mask, self.num_virtual_tokens, self.positions, kv_length, sliding_window)
            self._masks[sliding_window] = (mask, extended)
        return self._masks[sliding_window][1]


class PrefixRuntime(PrefixTunerLayer):
    """A child of the decoder that shifts its positions by p and evaluates the reparameterization once per forward pass.

    The decoder is the innermost module that is given positions and the cache: hooked there, calls to the task model and
    to the bare decoder are served alike.
    """

    adapter_layer_names = ("prefix_ext_reparam",)

    def __init__(self, decoder: Any, layer_indices: list[int]) -> None:
        super().__init__(decoder.get_input_embeddings().weight.device)
        self.prefix_ext_reparam = nn.ModuleDict()
        self.layer_indices = layer_indices
        self.num_virtual_tokens: dict[str, int] = {}
        self.awaiting_weights: set[str] = set()
        self.step: Step | None = None
        self._bypassed = False
        self._evaluated: tuple[Any, dict[int, LayerKV]] | None = None
        self._parameters_of_forward = list(inspect.signature(decoder.forward).parameters)
        self._handles = [
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, always_call=True),
            decoder.get_input_embeddings().register_forward_hook(self._after_embeddings),
        ]

    def detach(self) -> None:
        """Takes the hooks off the decoder."""
        for handle in self._handles:
            handle.remove()

    @property
    def current_adapter(self) -> str | None:
        """The adapter that the next forward pass uses, if any."""
        if self._bypassed or self.disable_adapters or not self.active_adapters:
            return None
        return self.active_adapters[0]

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Runs the base model alone, without a touch to any parameter's `requires_grad`."""
        before, self._bypassed = self._bypassed, True
        try:
            yield
        finally:
            self._bypassed = before

    def step_of(self, position_ids: torch.Tensor | None) -> Step:
        """Returns the forward pass that an attention layer with these positions belongs to.

        A checkpointed layer runs again in the backward pass, when other forward passes may have come in between: the
        positions, which it is given again, tell. Where a model does not hand them down it is the last forward pass.
        """
        step = getattr(position_ids, STEP, self.step)
        in_backward = torch._C._current_graph_task_id() != -1
        if step is None or not (step.running or in_backward):
            raise RuntimeError(
                "A layer with a prefix was called outside of its decoder's forward; call the whole model."
            )
        return step

    def _before_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        adapter = self.current_adapter
        if adapter is None:
            return None
        if adapter in self.awaiting_weights:
            raise RuntimeError(
                f"Adapter {adapter!r} was made from the config of a saved adapter, but its weights were never loaded; use "
                "`PeftModel.from_pretrained` or `load_adapter`, or a fresh `PrefixExtConfig` to train anew."
            )
        kwargs = {**dict(zip(self._parameters_of_forward, args, strict=False)), **kwargs}
        p = self.num_virtual_tokens[adapter]
        positions = kwargs.get("position_ids")
        if positions is None:
            inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
            if inputs is None:
                return None  # the decoder has its own words for it
            cache = kwargs.get("past_key_values")
            past = cache.get_seq_length() if cache is not None else 0
            positions = (torch.arange(inputs.shape[1], device=inputs.device) + past)[None]
        kwargs["position_ids"] = positions = positions + p
        # Multimodal rotary embeddings have a leading axis; its first entry counts the text.
        text_positions = positions[0] if positions.dim() == 3 else positions.view_as(positions)
        is_reentrant = torch.is_grad_enabled() and uses_reentrant_checkpointing(decoder)
        residuals, projected = self._residuals(adapter, is_reentrant)
        self.step = Step(adapter, p, text_positions, residuals, is_reentrant, projected)
        setattr(positions, STEP, self.step)
        if kwargs.get("inputs_embeds") is not None:
            kwargs["inputs_embeds"] = self._require_gradient(kwargs["inputs_embeds"])
        return (), kwargs

    def _after_decoder(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        if self.step is not None:
            self.step.running = False

    def _after_embeddings(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return self._require_gradient(output)

    def _require_gradient(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Reentrant checkpointing drops the gradient of everything behind inputs that do not require one."""
        if self.current_adapter is None or self.step is None or not (self.step.running and self.step.is_reentrant):
            return embeddings
        if self.step.projected is not None:
            return gather_gradient(embeddings, *self.step.projected)
        return embeddings if embeddings.requires_grad else embeddings.requires_grad_()

    def _residuals(
        self, adapter: str, is_reentrant: bool
    ) -> tuple[dict[int, LayerKV], tuple[torch.Tensor, torch.Tensor] | None]:
        if adapter not in self.prefix_ext_reparam:
            return {}, None
        mlp: Any = self.prefix_ext_reparam[adapter]
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in mlp.parameters()):
            projected = mlp.project()
            if not is_reentrant:
                return self._by_layer(mlp.split(projected)), None
            leaf = projected.detach().requires_grad_()
            return self._by_layer(mlp.split(leaf)), (leaf, projected)
        if mlp.training:
            return self._by_layer(mlp()), None
        # In evaluation a decoding loop asks for the same K/V at every token. The versions change with every in-place
        # write, as by an optimizer or by load_state_dict.
        versions = (adapter, [(id(parameter), parameter._version) for parameter in mlp.parameters()])
        if self._evaluated is None or self._evaluated[0] != versions:
            with torch.no_grad():
                self._evaluated = (versions, self._by_layer(mlp()))
        return self._evaluated[1], None

    def _by_layer(self, states: list[LayerKV]) -> dict[int, LayerKV]:
        return dict(zip(self.layer_indices, states, strict=True))
