"""Models whose parameters DeepSpeed ZeRO-3 partitions over processes.

Once training is prepared, DeepSpeed gathers the parameters of a module while it runs. A model that is created
partitioned is probed before that, and needs `gathered_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def is_partitioned(tensor: Any) -> bool:
    """Whether a parameter is partitioned and not gathered at the moment."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


@contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """Gathers the partitioned parameters that a module reads while it runs; all processes must run the model."""
    if not any(is_partitioned(parameter) for parameter in model.parameters()):
        yield
        return
    import deepspeed

    gathered: dict[nn.Module, ExitStack] = {}

    def enter(module: nn.Module, args: Any) -> None:
        partitioned = [parameter for parameter in _read_by(module) if is_partitioned(parameter)]
        if partitioned:
            gathered[module] = ExitStack()
            gathered[module].enter_context(deepspeed.zero.GatheredParameters(partitioned))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in gathered:
            gathered.pop(module).close()

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def _read_by(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters that a module's own code may read.

    Those of its parts are among them: recurrent mixers read the weight of their convolution without calling it. Whole
    models call their embeddings and heads, which are large.
    """
    yield from module.parameters(recurse=False)
    if not isinstance(module, PreTrainedModel):
        for child in module.children():
            if next(child.children(), None) is None:
                yield from child.parameters()
