"""Wrappers of `PeftModel` methods that call no hook of a tuner. No other module wraps PEFT."""

from __future__ import annotations

import inspect
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import wrapt
from peft import PeftConfig, PeftModel
from peft.config import PeftConfigMixin
from transformers import PreTrainedModel

from peft_prefix_ext.architectures.shared_kv import hooked_modules
from peft_prefix_ext.base_model.offloaded import keep_offloading
from peft_prefix_ext.checkpoint.atomic_save import config_of, replacing
from peft_prefix_ext.checkpoint.format import CONFIG_NAME
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.peft_type import PREFIX_EXT
from peft_prefix_ext.tuner.model_card import CARD_NAME, write_card
from peft_prefix_ext.tuner.other_adapters import warn_of_other_adapters
from peft_prefix_ext.tuner.requirements import check_modules_to_save, check_task
from peft_prefix_ext.tuner.saved_adapters import check_saved_adapter


def wrap_peft_model() -> None:
    """Wraps the methods. The last one is private to transformers; without it, uploaded model cards are not extended."""
    for name, wrapper in {
        "__init__": _init,
        "from_pretrained": _from_pretrained,
        "add_adapter": _add_adapter,
        "load_adapter": _load_adapter,
        "save_pretrained": _save_pretrained,
        "create_or_update_model_card": _create_or_update_model_card,
        "_upload_modified_files": _upload_modified_files,
    }.items():
        if hasattr(PeftModel, name):
            _wrap_once(PeftModel, name, wrapper)
    _wrap_once(PeftConfigMixin, "from_json_file", _from_json_file)


def _wrap_once(cls: type, name: str, wrapper: Any) -> None:
    """Wraps a method, unless it was before this package was reloaded."""
    wrapped = vars(cls).get(name)
    while isinstance(wrapped, wrapt.FunctionWrapper):
        if getattr(wrapped._self_wrapper, "__module__", None) == __name__:
            return
        wrapped = wrapped.__wrapped__
    wrapt.wrap_function_wrapper(cls, name, wrapper)


def _has_prefix(model: Any) -> bool:
    return any(isinstance(config, PrefixExtConfig) for config in model.peft_config.values())


def _init(wrapped: Any, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    base = call["model"].get_base_model() if isinstance(call["model"], PeftModel) else call["model"]
    if isinstance(call["peft_config"], PrefixExtConfig) and isinstance(base, PreTrainedModel):
        check_task(call["peft_config"], base)
    _check_beside_prefix(call["peft_config"], base)
    wrapped(*args, **kwargs)


def _from_pretrained(wrapped: Any, cls: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Keeps an offloaded model dispatched, which PEFT would undo before the prefix is added."""
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    base = call["model"]
    if getattr(base, "hf_device_map", None) is None or not _is_prefix(call):
        return wrapped(*args, **kwargs)
    with keep_offloading(base):
        return wrapped(*args, **kwargs)


def _is_prefix(call: dict[str, Any]) -> bool:
    """Whether the adapter of a call of `from_pretrained` is a prefix."""
    if isinstance(call.get("config"), PeftConfig):
        return call["config"].peft_type == PREFIX_EXT
    hub_options, _ = PeftModel._split_kwargs(call.get("kwargs", {}))
    try:
        return PeftConfig._get_peft_type(call["model_id"], **hub_options) == PREFIX_EXT
    except (OSError, ValueError):  # PEFT raises it again
        return False


def _check_beside_prefix(config: PeftConfig, base: Any) -> None:
    """Checks an adapter of another type; for a prefix, the injection plan does this."""
    if config.peft_type != PREFIX_EXT:
        check_modules_to_save(getattr(config, "modules_to_save", None), base, hooked_modules(base))


def _add_adapter(wrapped: Any, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuses adapters of two types in one `PeftModel` as PEFT does, and says how to combine them."""
    config = inspect.signature(wrapped).bind(*args, **kwargs).arguments["peft_config"]
    if config.peft_type != model.peft_type and PREFIX_EXT in (config.peft_type, model.peft_type):
        raise ValueError(
            f"An adapter of type {config.peft_type.value} cannot go into a `PeftModel` of type {model.peft_type.value}: put it on "
            "`model.get_base_model()`, which both then work in, by `get_peft_model` or `PeftModel.from_pretrained` with an "
            "`adapter_name` of its own."
        )
    _check_beside_prefix(config, model)
    wrapped(*args, **kwargs)


def _load_adapter(wrapped: Any, model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Checks the saved config even if the adapter exists, when PEFT would not read it."""
    # Not by the signature: ms-swift wraps the method as well, in one that passes on whatever it gets.
    call = {**dict(zip(("model_id", "adapter_name"), args, strict=False)), **kwargs}
    live = model.peft_config.get(call.get("adapter_name"))
    if isinstance(live, PrefixExtConfig):
        hub_options, _ = model._split_kwargs(kwargs)
        try:
            saved = PeftConfig.from_pretrained(call["model_id"], **hub_options)
        except (OSError, ValueError):
            saved = None  # weights alone
        if isinstance(saved, PrefixExtConfig):
            check_saved_adapter(saved, model.get_base_model(), live=None)
            if saved.base_adapters != live.base_adapters:  # otherwise the live one already warned
                warn_of_other_adapters(saved, model)
    try:
        with keep_offloading(model.get_base_model()) if _has_prefix(model) else nullcontext():
            return wrapped(*args, **kwargs)
    except KeyError as error:
        config = model.peft_config.get(call.get("adapter_name"))
        if not isinstance(config, PrefixExtConfig):
            raise
        raise ValueError(
            f"The adapter in {call['model_id']} has no weights {error} for a module that `task_type` or `modules_to_save` "
            "would have with it: load it with a `config` whose `task_type` is None, or the one it was trained with."
        ) from error


def _save_pretrained(wrapped: Any, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Replaces the files atomically: PEFT overwrites them, and a process killed meanwhile would leave a broken adapter."""
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    folder = Path(call.arguments["save_directory"])
    if not _has_prefix(model) or not call.arguments.get("is_main_process", True) or folder.is_file():
        wrapped(*args, **kwargs)
        return
    with replacing(folder) as new:
        if (folder / CARD_NAME).is_file():
            shutil.copy(folder / CARD_NAME, new)  # PEFT adds to it
        call.arguments["save_directory"] = str(new)
        wrapped(*call.args, **call.kwargs)


def _from_json_file(wrapped: Any, config: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    path = Path(call.arguments["path_json_file"])
    if path.name == CONFIG_NAME and (valid := config_of(path.parent)) != path:
        with suppress(FileNotFoundError):
            return wrapped(str(valid))
    return wrapped(*args, **kwargs)


def _create_or_update_model_card(wrapped: Any, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    wrapped(*args, **kwargs)
    if _has_prefix(model):
        write_card(model, inspect.signature(wrapped).bind(*args, **kwargs).arguments["output_dir"])


def _upload_modified_files(wrapped: Any, model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Writes the card again: `push_to_hub` overwrites it with a template, and only here is the repository known."""
    if _has_prefix(model):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        model.create_or_update_model_card(call["working_dir"])
        write_card(model, call["working_dir"], call["repo_id"])
    return wrapped(*args, **kwargs)
