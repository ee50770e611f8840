"""PEFT's `adapter_names` in `forward` and `generate`: a batch whose rows have different adapters.

Checks and messages follow PEFT's LoRA (peft 0.21, tuners/lora/model.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from peft_prefix_ext.architectures.column_distances import uses_column_distances
from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.injection.batch import BASE_ADAPTER, BatchAdapters
from peft_prefix_ext.injection.decoder_hook import decoder_hooks_of


@contextmanager
def use_adapter_names(model: PreTrainedModel, names: Any, call: dict[str, Any]) -> Iterator[None]:
    """Gives row i of each batch the adapter `names[i]`, and none if that is `"__base__"`.

    Args:
        model: The model with the adapters.
        names: `adapter_names`, one for each input.
        call: The other arguments of `forward` or `generate`, which say how many rows each input is expanded to.

    Raises:
        ValueError: If the model is in training mode, or has no such adapter.
    """
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if model.config.is_encoder_decoder:
        raise ValueError(
            "`adapter_names` is not supported for encoder-decoder models; use `set_adapter` for the batch."
        )
    if any(uses_column_distances(module) for module in model.modules()):
        raise ValueError(f"`adapter_names` is not supported for {describe(model)}; use `set_adapter` for the batch.")
    (hook,) = decoder_hooks_of(model)
    if unknown := set(names) - hook.num_virtual_tokens.keys() - {BASE_ADAPTER}:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            _check_wrapper(name, module, names)
            hook.pass_adapter_names_to(module)
    batch = BatchAdapters.from_adapter_names(names, hook.num_virtual_tokens, model.device, _expand_size(call))
    with hook.use_batch_adapters(batch):
        yield


def _expand_size(call: dict[str, Any]) -> int:
    """Returns how many rows `generate` makes of each input."""
    given = [call, vars(call["generation_config"])] if call.get("generation_config") is not None else [call]
    return max(
        next((values[name] for values in given if values.get(name) is not None), 1)
        for name in ("num_beams", "num_return_sequences")
    )


def _check_wrapper(module_name: str, wrapper: AuxiliaryTrainingWrapper, names: Sequence[str]) -> None:
    if not wrapper._adapters.isdisjoint(names) and not wrapper._adapters.issuperset(wrapper.active_adapters):
        raise ValueError(
            f"The active adapter has no {module_name!r} of its own, without which PEFT ignores those of `adapter_names`; "
            f"make one of {sorted(wrapper._adapters)} active with `set_adapter`."
        )
