"""`PrefixExtModel`: gives every attention layer of a frozen model a trainable prefix."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft import PeftModel, PeftType
from peft.utils import register_peft_method
from torch import nn

from peft_prefix_ext.architectures.encoder_decoder import LAYER_CLASSES, PrefixStackHook
from peft_prefix_ext.architectures.select import select_layer_class
from peft_prefix_ext.architectures.shared_kv import SharedKVLayer, find_shared_kv_layers
from peft_prefix_ext.attention.grouped_query import register_grouped_query_attention
from peft_prefix_ext.base_model.attention_implementation import attention_implementation
from peft_prefix_ext.checkpoint.compatibility import rename_to_model_modules
from peft_prefix_ext.checkpoint.format import is_of_prefix
from peft_prefix_ext.checkpoint.local_paths import absolute_if_local
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.injection.caller_positions import enclosing_models
from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook, decoder_hooks_of
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer
from peft_prefix_ext.peft_type import PREFIX_EXT
from peft_prefix_ext.tuner.adapter_names import use_adapter_names
from peft_prefix_ext.tuner.injection_plan import InjectionPlan, make_injection_plan
from peft_prefix_ext.tuner.learning_rate import watch_learning_rate
from peft_prefix_ext.tuner.other_adapters import active_base_adapters
from peft_prefix_ext.tuner.peft_model import wrap_peft_model
from peft_prefix_ext.tuner.requirements import HEADS
from peft_prefix_ext.tuner.self_test import check_decoder_matches_text
from peft_prefix_ext.tuner.state_dict import WRAPPED, State, from_checkpoint, refuse_parts, to_checkpoint
from peft_prefix_ext.tuner.tested_versions import warn_of_untested_versions
from peft_prefix_ext.tuner.trained_modules import complete_tied_head, settle_trained_tokens, unwrap
from peft_prefix_ext.tuner.unmergeable import UnmergeableTuner

logger = logging.getLogger(__name__)


class PrefixExtModel(UnmergeableTuner):
    """
    Trains key/value prefixes (Li & Liang 2021, https://arxiv.org/abs/2101.00190) by injection into attention layers.

    Not one of PEFT's prompt-learning types: the model's inputs, masks and caches stay its own, and so gradient
    checkpointing, static caches, padding and every way to generate work as without an adapter.

    An adapter has a copy of the config that it was given, `peft_config[name]`: what that records of one model is not true of
    the next. Another adapter from this copy starts as the adapter is, and from the config that was given as the config says.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted.
        config ([`PrefixExtConfig`]): The configuration of the prefix.
        adapter_name (`str`): The name of the adapter, `"default"` by default.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_prefix_ext import PrefixExtConfig

        >>> config = PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=16, init="text", init_text="Summarize:")
        >>> model = get_peft_model(model, config)
        ```
    """

    prefix: str = "prefix_ext_"
    tuner_layer_cls = PrefixTunerLayer

    _plan: InjectionPlan  # while an adapter is being injected

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        warn_of_untested_versions()
        if isinstance(model, PeftModel):
            if model.active_peft_config.is_prompt_learning:
                raise ValueError(
                    f"A prefix cannot stand on an adapter of type {model.active_peft_config.peft_type.value}, which works "
                    "in a `PeftModel` around the base model and not within it."
                )
            model = model.get_base_model()
        # Whatever was put on this model before shares one dict of configs with us; a failure leaves it as it was.
        shared = getattr(model, "peft_config", {})
        before = dict(shared)
        taken = before.get(adapter_name)
        if taken is not None and taken.peft_type != PREFIX_EXT:
            raise ValueError(
                f"The model has an adapter {adapter_name!r} of type {PeftType(taken.peft_type).value} already; give the prefix a name "
                'of its own, as `adapter_name="task"`.'
            )
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except Exception:
            shared.clear()
            shared.update(before)
            raise
        self.peft_config = self.peft_config  # one's own, not through the model, which loses it when LoRA is merged

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: State | None = None,  # by which PEFT finds the targets of other adapters
    ) -> None:
        if "." in adapter_name:
            raise ValueError(f"The name of an adapter must not have a dot in it, got {adapter_name!r}.")
        given = self.peft_config[adapter_name]
        twins = [name for name, config in self.peft_config.items() if config is given and name != adapter_name]
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            if twins:
                # An adapter from the config of one that is here, such as the reference model of TRL's `DPOTrainer`, which
                # copies the parameters itself, but not what is frozen: a config alone does not say where it started.
                for module in model.modules():
                    if isinstance(module, PrefixTunerLayer):
                        module.copy_adapter_from(adapter_name, twins[0])
            complete_tied_head(self.model)
            if not given.inference_mode:
                watch_learning_rate(model)
        finally:
            vars(self).pop("_plan", None)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        # The user's config may serve several models, and what is recorded of a model belongs to one.
        own = copy.copy(peft_config)
        # A relative path would mean another folder, or none, where the adapter is loaded.
        name = own.base_model_name_or_path or getattr(self.model, "name_or_path", None)
        own.base_model_name_or_path = absolute_if_local(name or None)
        # PEFT trains the head, too, but of a tagger it says so in the config it was given, and only after this.
        heads = HEADS.get(own.task_type, ())
        if heads:
            own.modules_to_save = [*dict.fromkeys([*(own.modules_to_save or []), *heads])]
        self.peft_config[self._name_of(peft_config)] = own
        return own

    def _name_of(self, peft_config: Any) -> str:
        # The last: a config of an adapter that is here already may be given for another one.
        return [name for name, config in self.peft_config.items() if config is peft_config][-1]

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        self._plan = make_injection_plan(peft_config, model)
        settle_trained_tokens(peft_config, model)
        if not peft_config.is_saved:
            logger.info("Adapter %r starts as %s", self._name_of(peft_config), peft_config.init_report)
        # `get_peft_model` a second time on one base, of which PEFT warns: an adapter of the same name starts anew.
        for module in list(model.modules()):
            if isinstance(module, PrefixTunerLayer):
                module.drop_adapter(self._name_of(peft_config))

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._plan.layers

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        recorded = self._plan.layers[current_key]
        runtime = self._get_or_create_hook(adapter_name, peft_config, self._plan.stacks[recorded.attention])
        layer = getattr(target, "prefix_ext", None)
        if layer is None:
            in_stacks = isinstance(runtime, PrefixStackHook)
            kind = LAYER_CLASSES[recorded.attention] if in_stacks else select_layer_class(target, recorded)
            layer = target.prefix_ext = kind(target, recorded, runtime)
        has_reparam = adapter_name in runtime.prefix_ext_reparam
        layer.update_layer(adapter_name, self._plan.initial[current_key], peft_config, has_reparam)
        if peft_config.is_saved:
            layer.awaiting_weights.add(adapter_name)

    def _get_or_create_hook(self, adapter_name: str, config: PrefixExtConfig, stack: str) -> PrefixDecoderHook:
        """Returns the runtime of a stack, with the adapter in it."""
        module: Any = self.model.get_submodule(stack)
        runtime = getattr(module, "prefix_ext", None)
        if runtime is None:
            # Not before PEFT has looked at the model: it takes any tuner layer for a sign that the base is frozen.
            runtime_class = PrefixStackHook if self.model.config.is_encoder_decoder else PrefixDecoderHook
            is_first = not decoder_hooks_of(self.model)
            runtime = module.prefix_ext = runtime_class(module, enclosing_models(module, self.model))
            runtime.tested_attention.add(attention_implementation(module.config))  # by the plan
            if not self.model.config.is_encoder_decoder:
                runtime.test_attention = check_decoder_matches_text
            runtime.device = next(iter(self._plan.layers.values())).kv.key.device  # weights may be offloaded
            if is_first:
                runtime.add_handle(self.model.register_load_state_dict_pre_hook(refuse_parts))
            shared = find_shared_kv_layers(self.model, self._plan.layers)
            runtime.shared_kv_layers = [SharedKVLayer(attention, owner, runtime) for attention, owner in shared]
        if adapter_name in runtime.num_virtual_tokens:
            return runtime
        runtime.num_virtual_tokens[adapter_name] = config.num_virtual_tokens
        runtime.prefix_dropout[adapter_name] = config.prefix_dropout
        runtime.layer_names[adapter_name] = [
            layer.module
            for layer in self._plan.layers.values()
            if self._plan.stacks[layer.attention] == stack and config.trains(layer.index)
        ]
        if (mlp := self._plan.mlps[stack]) is not None:
            runtime.prefix_ext_reparam[adapter_name] = mlp
        return runtime

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Sets the active adapter; a model has one prefix at a time."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"PREFIX_EXT has one active adapter at a time, got {list(adapter_name)}.")
        self._refuse_others([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self._refuse_others([adapter_name])
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        # PEFT passes by what is within a module of the base called like our tensors.
        for module in self.model.modules():
            if isinstance(module, PrefixTunerLayer) and adapter_name in module._all_available_adapter_names():
                module.delete_adapter(adapter_name)
        remaining = sorted(name for name, config in self.peft_config.items() if config.peft_type == PREFIX_EXT)
        if was_active and remaining:  # each layer chose for itself, and need not have them all
            self.set_adapter(remaining[0])

    def _refuse_others(self, names: list[str]) -> None:
        """The configs of a model are shared by all that was put on it, such as LoRA under a prefix."""
        for name in names:
            config = self.peft_config.get(name)
            if config is not None and config.peft_type != PREFIX_EXT:
                raise ValueError(
                    f"Adapter {name!r} is of type {PeftType(config.peft_type).value}, not a prefix; use the model it was made with."
                )

    def unload(self) -> nn.Module:
        """Returns the base model, free of all prefixes, with what else was put on it."""
        for module in list(self.model.modules()):
            if isinstance(getattr(module, "prefix_ext", None), self.tuner_layer_cls):
                module.prefix_ext.detach()
                del module.prefix_ext
        names = {name for name, config in self.peft_config.items() if config.peft_type == PREFIX_EXT}
        unwrap(self.model, self.peft_config, names)
        for name in names:
            del self.peft_config[name]
        if not self.peft_config and hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def forward(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        # PEFT takes `adapter_names` off before it comes here, except for MPT.
        with self._enable_peft_forward_hooks(adapter_names=adapter_names) if adapter_names else nullcontext():
            return super().forward(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Gives each row of the batch its own adapter, as `adapter_names` say, until the context ends."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
        else:
            with use_adapter_names(self.model, names, kwargs):
                yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: State,
        unwanted_adapter_names: list[str],
    ) -> State:
        if state_dict:  # not in a process that saves nothing
            # The config is saved right after this: with what is below the prefix now, which may have been trained with it.
            config._recorded["base_adapters"] = [adapter._asdict() for adapter in active_base_adapters(model)]
        saved = to_checkpoint(model, config, adapter_name, state_dict)
        # transformers, which wraps no model in another, adds the prefix itself.
        return saved if isinstance(model, PeftModel) else {name.removeprefix(WRAPPED): saved[name] for name in saved}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # What `to_checkpoint` returns has no adapter name in it; a module could be called like the adapter.
        is_ours = is_of_prefix(key) or is_of_prefix(WRAPPED + key)
        return key if is_ours else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: State
    ) -> State:
        saved = {
            WRAPPED + name if is_of_prefix(WRAPPED + name) and not is_of_prefix(name) else name: tensor
            for name, tensor in state_dict.items()
        }
        return from_checkpoint(model, config, adapter_name, rename_to_model_modules(config, saved))


register_peft_method(name="prefix_ext", config_cls=PrefixExtConfig, model_cls=PrefixExtModel)
wrap_peft_model()
register_grouped_query_attention()
