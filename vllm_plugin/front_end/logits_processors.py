"""Custom logits processors: they see a request's own prompt, as without a prefix, or the engine does not start.

In model runner V1 vLLM hands them the prompt of each request that joins the batch: there the placeholders come off. In
model runner V2 they read the buffers of the runner itself.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from vllm_plugin.adapters.spec import ADAPTERS, unpack

# vLLM loads all of these, whatever its options say.
ENTRY_POINTS = "vllm.logits_processors"


def unsupported(vllm_config: Any) -> str | None:
    """Names the processors that would see placeholders as text, for a message; None if none would."""
    given = vllm_config.model_config.logits_processors or ()
    names = [each if isinstance(each, str) else f"{each.__module__}:{each.__qualname__}" for each in given]
    names += [f"{each.value}, of the entry points of an installed package" for each in entry_points(group=ENTRY_POINTS)]
    if not names or not vllm_config.use_v2_model_runner:
        return None
    return (
        f"custom logits processors in model runner V2 ({'; '.join(names)}; with VLLM_USE_V2_MODEL_RUNNER=0 in the environment "
        "they work)"
    )


def show_real_prompt(batch: Any, request: Any) -> None:
    """Takes the placeholders out of what processors are told of a request that has just joined a batch.

    Args:
        batch: vLLM's `InputBatch`, whose last news is this request.
    """
    extra_args = getattr(request.sampling_params, "extra_args", None) or {}
    packed = (extra_args.get("kv_transfer_params") or {}).get(ADAPTERS)
    if packed is None:
        return
    news = batch.batch_update_builder.added
    index, params, prompt, output = news[-1]
    news[-1] = index, params, prompt[unpack(packed).num_virtual_tokens :], output
