"""Custom logits processors see a request's real prompt, without the placeholders of its prefix.

vLLM's model runner V1 passes them the prompt of each request that joins the batch, and the placeholders are removed
there. `logits_processors_v2.py` is for model runner V2.
"""

from __future__ import annotations

from typing import Any

from vllm_plugin.adapters.spec import unpack
from vllm_plugin.kv_transfer_config import ADAPTERS


def show_real_prompt(batch: Any, request: Any) -> None:
    """Removes the placeholders from the prompt that processors get of a request that has just joined a batch.

    Args:
        batch: vLLM's `InputBatch`, whose last added entry is this request.
        request: vLLM's `CachedRequestState`.
    """
    if p := num_placeholders(request.sampling_params):
        added = batch.batch_update_builder.added
        index, params, prompt, output = added[-1]
        added[-1] = index, params, prompt[p:], output


def num_placeholders(sampling_params: Any) -> int:
    """Returns how many placeholders precede the prompt of a request: p, and 0 without a prefix."""
    extra_args = getattr(sampling_params, "extra_args", None) or {}
    packed = (extra_args.get("kv_transfer_params") or {}).get(ADAPTERS)
    return 0 if packed is None else unpack(packed).num_virtual_tokens
