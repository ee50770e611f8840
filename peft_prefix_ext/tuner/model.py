"""`PrefixExtModel`: adds a trainable prefix to every attention layer of a frozen model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft import PeftModel, PeftType
from torch import nn

from peft_prefix_ext.attention.grouped_query import register_grouped_query_attention
from peft_prefix_ext.checkpoint.format import DECODER, is_of_prefix
from peft_prefix_ext.checkpoint.local_paths import absolute_if_local
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook, decoder_hooks_of
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer
from peft_prefix_ext.peft_type import PREFIX_EXT, register
from peft_prefix_ext.tuner.adapter_names import use_adapter_names
from peft_prefix_ext.tuner.injection_plan import InjectionPlan, create_hook, create_layer, make_injection_plan
from peft_prefix_ext.tuner.learning_rate import raise_low_learning_rates
from peft_prefix_ext.tuner.other_adapters import active_base_adapters
from peft_prefix_ext.tuner.peft_model import wrap_peft_model
from peft_prefix_ext.tuner.requirements import HEADS
from peft_prefix_ext.tuner.saved_adapters import rename_to_model_modules
from peft_prefix_ext.tuner.state_dict import WRAPPED, State, from_checkpoint, refuse_parts, to_checkpoint
from peft_prefix_ext.tuner.tested_versions import warn_of_untested_versions
from peft_prefix_ext.tuner.trained_modules import complete_tied_head, settle_trained_tokens, unwrap
from peft_prefix_ext.tuner.unmergeable import UnmergeableTuner

logger = logging.getLogger(__name__)


class PrefixExtModel(UnmergeableTuner):
    """
    Trains key/value prefixes (Li & Liang 2021, https://arxiv.org/abs/2101.00190) that are injected into attention layers.

    Unlike PEFT's prompt-learning methods it leaves the inputs, masks and caches of the model alone, so that gradient
    checkpointing, static caches, padding and all generation strategies work as without an adapter.

    Each adapter keeps its own copy of the config, `peft_config[name]`, which records facts about this one model. A second
    adapter that is created from this copy starts with the current K/V of the first; one that is created from the original
    config starts as the config says.

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

    # Set while `inject_adapter` runs.
    _injected_adapter: str | None = None
    _injection_plan: InjectionPlan | None = None

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        warn_of_untested_versions()
        if isinstance(model, PeftModel):
            if model.active_peft_config.is_prompt_learning:
                raise ValueError(
                    f"A prefix cannot be added to an adapter of type {model.active_peft_config.peft_type.value}, which works "
                    "in a `PeftModel` around the base model and not inside it."
                )
            model = model.get_base_model()
        # All adapters of a model, such as LoRA below a prefix, share one dict of configs. Restore it after a failure.
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
        # `BaseTuner` may have left it to be looked up on the model, which loses the dict when LoRA is merged.
        self.peft_config = self.model.peft_config

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: State | None = None,  # PEFT finds the target modules of other methods by it
    ) -> None:
        if "." in adapter_name:
            raise ValueError(f"The name of an adapter must not have a dot in it, got {adapter_name!r}.")
        given = self.peft_config[adapter_name]
        source_adapter = next(
            (name for name, config in self.peft_config.items() if config is given and name != adapter_name), None
        )
        self._injected_adapter = adapter_name
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        finally:
            self._injected_adapter = self._injection_plan = None
        if source_adapter is not None:
            # This is the config of an existing adapter, as for the reference model of TRL's `DPOTrainer`. TRL copies the
            # parameters, but not the frozen K/V, and a config does not say what those are.
            for module in model.modules():
                if isinstance(module, PrefixTunerLayer):
                    module.copy_adapter_from(adapter_name, source_adapter)
        complete_tied_head(self.model)
        if not given.inference_mode:
            raise_low_learning_rates(model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        assert self._injected_adapter is not None
        # The user may use one config for several models; what an adapter records is true of one model.
        own = copy.copy(peft_config)
        # A relative path would be wrong in another working directory.
        name = own.base_model_name_or_path or getattr(self.model, "name_or_path", None)
        own.base_model_name_or_path = absolute_if_local(name or None)
        # PEFT adds the head itself, but for token classification only to the config it was given, and after this.
        heads = HEADS.get(own.task_type, ())
        if heads:
            own.modules_to_save = [*dict.fromkeys([*(own.modules_to_save or []), *heads])]
        self.peft_config[self._injected_adapter] = own
        return own

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        assert self._injected_adapter is not None
        self._injection_plan = make_injection_plan(peft_config, model)
        settle_trained_tokens(peft_config, model)
        if not peft_config.is_saved:
            logger.info("Adapter %r starts as %s", self._injected_adapter, peft_config.init_report)
        # After a second `get_peft_model` on one base, which PEFT warns of, an adapter of the same name starts anew.
        for module in list(model.modules()):
            if isinstance(module, PrefixTunerLayer):
                module.drop_adapter(self._injected_adapter)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        assert self._injection_plan is not None
        return key in self._injection_plan.layers or key in self._injection_plan.states

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
        plan = self._injection_plan
        assert plan is not None
        attention = plan.layers[current_key].attention if current_key in plan.layers else DECODER
        hook = self._get_or_create_hook(adapter_name, peft_config, plan, plan.stacks[attention])
        layer: Any = getattr(target, "prefix_ext", None)
        if layer is None:
            layer = target.prefix_ext = create_layer(target, parent, current_key, plan, hook)
        if current_key in plan.states:
            layer.update_layer(adapter_name, plan.initial_states[current_key], peft_config)
        else:
            has_reparam = adapter_name in hook.prefix_ext_reparam
            layer.update_layer(adapter_name, plan.initial[current_key], peft_config, has_reparam)
        if peft_config.is_saved:
            layer.awaiting_weights.add(adapter_name)

    def _get_or_create_hook(
        self, adapter_name: str, config: PrefixExtConfig, plan: InjectionPlan, stack: str
    ) -> PrefixDecoderHook:
        """Returns the hook of a stack, with the adapter added to it."""
        module: Any = self.model.get_submodule(stack)
        hook = getattr(module, "prefix_ext", None)
        if hook is None:
            # Not before PEFT has looked at the model: it takes any tuner layer as a sign that the base is frozen.
            is_first = not decoder_hooks_of(self.model)
            hook = module.prefix_ext = create_hook(self.model, module, plan)
            if is_first:
                hook.add_handle(self.model.register_load_state_dict_pre_hook(refuse_parts))
        if adapter_name in hook.num_virtual_tokens:
            return hook
        hook.num_virtual_tokens[adapter_name] = config.num_virtual_tokens
        hook.configs[adapter_name] = config
        hook.layer_names[adapter_name] = [
            layer.module
            for layer in plan.layers.values()
            if plan.stacks[layer.attention] == stack and config.trains(layer.index)
        ]
        if (mlp := plan.mlps[stack]) is not None:
            hook.prefix_ext_reparam[adapter_name] = mlp
        return hook

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Sets the active adapter; only one prefix can be active at a time."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"PREFIX_EXT has one active adapter at a time, got {list(adapter_name)}.")
        self._refuse_others([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self._refuse_others([adapter_name])
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        # PEFT skips tuner layers within a module of the base model whose name contains `prefix_ext_`.
        for module in self.model.modules():
            if isinstance(module, PrefixTunerLayer) and adapter_name in module._all_available_adapter_names():
                module.delete_adapter(adapter_name)
        remaining = sorted(name for name, config in self.peft_config.items() if config.peft_type == PREFIX_EXT)
        if was_active and remaining:  # PEFT chose a new one for each layer, and a layer need not have all of them
            self.set_adapter(remaining[0])

    def _refuse_others(self, names: list[str]) -> None:
        """Raises `ValueError` for adapters of other types, such as LoRA below a prefix, whose configs are in the same dict."""
        for name in names:
            config = self.peft_config.get(name)
            if config is not None and config.peft_type != PREFIX_EXT:
                raise ValueError(
                    f"Adapter {name!r} is of type {PeftType(config.peft_type).value}, not a prefix; use the model it was created "
                    "with."
                )

    def unload(self) -> nn.Module:
        """Returns the base model without its prefixes; adapters of other types stay on it."""
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
        # PEFT removes `adapter_names` before this call, except for MPT.
        with self._enable_peft_forward_hooks(adapter_names=adapter_names) if adapter_names else nullcontext():
            return super().forward(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Gives each row of the batch the adapter that `adapter_names` says."""
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
        if state_dict:  # empty in processes that do not save
            # The config is saved right after this. Record the other adapters as they are now, in case they were trained too.
            config._saved_fields["base_adapters"] = [adapter._asdict() for adapter in active_base_adapters(model)]
        saved = to_checkpoint(model, config, adapter_name, state_dict)
        # Without a `PeftModel` around the model, transformers adds this part of the names itself.
        return saved if isinstance(model, PeftModel) else {name.removeprefix(WRAPPED): saved[name] for name in saved}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Names of `to_checkpoint` contain no adapter name, but a module may be called like the adapter.
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


register(PrefixExtConfig, PrefixExtModel)
wrap_peft_model()
register_grouped_query_attention()
