"""Speculative decoding beside prefixes: what stays exact, and what a draft model misses without a prefix of its own.

The model verifies each draft token with the prefix in its cache, so a wrong draft costs time and changes no token. Draft
layers keep K/V of their own. Where nothing writes a prefix there, they draft as if they had not read it, and few of
their tokens are accepted. A prefix that was trained on the draft model (`draft_path`) fills them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.logger import logger

# How vLLM may accept drafts without changing the distribution of the output.
_EXACT = ("standard", "block")
# These read token ids, or what the model computes with the prefix. They have no cache of their own.
_WITHOUT_CACHE = ("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator")


def lossy_speculation(speculative_config: Any) -> str | None:
    """Returns what makes this speculative decoding change outputs; None if nothing does.

    Methods that this release does not know are fine: the model verifies their drafts as well.

    Args:
        speculative_config: vLLM's `SpeculativeConfig`, or None.
    """
    if speculative_config is None:
        return None
    if speculative_config.method == "extract_hidden_states":
        return "the extraction of hidden states (--speculative-config), of which virtual tokens have none"
    accepts_by = getattr(speculative_config, "rejection_sample_method", "standard")
    if accepts_by not in _EXACT:
        return f"speculative decoding that changes outputs (`rejection_sample_method` {accepts_by!r})"
    return None


def draft_model(vllm_config: Any) -> Any:
    """Returns vLLM's `ModelConfig` of the draft model; None for an engine without one."""
    config = vllm_config.speculative_config
    return config.draft_model_config if config is not None and config.method == "draft_model" else None


def warn_of_drafts(specs: Iterable[PrefixSpec], vllm_config: Any) -> None:
    """Warns once of prefixes that the layers which draft do not have.

    Args:
        specs: The prefixes that are served.
        vllm_config: The engine's config.
    """
    config = vllm_config.speculative_config
    # The layers of Gemma 4's assistant read the cache of the model itself.
    if config is None or config.method in _WITHOUT_CACHE or getattr(config, "use_gemma4_mtp", lambda: False)():
        return
    without = [spec.name for spec in specs if spec.draft is None]
    if not without:
        return
    names = ", ".join([*map(repr, without[:5]), *(["..."] if len(without) > 5 else [])])
    advice = (
        "name a prefix that was trained on the draft model, NAME=PATH,draft=PATH"
        if config.method == "draft_model"
        else 'use a draft model with a prefix of its own ({"method": "draft_model"}), or {"method": "ngram"}'
    )
    logger.warning(
        "Speculative decoding by %r: prefixes change no output, but its layers lack the prefix of %s, so fewer drafts are "
        "accepted; %s.",
        config.method,
        names,
        advice,
    )
