"""LongRoPE, where the rotation depends on the length of the text: vLLM chooses it once, transformers for each text."""

from __future__ import annotations

from typing import Any

from vllm_plugin.errors import PrefixServeError


def check_rotation(model: Any) -> None:
    """Checks that vLLM rotates keys as transformers does for texts of the original length, which prefixes are trained on.

    Args:
        model: vLLM's `ModelConfig`.

    Raises:
        PrefixServeError: If it would rotate the text otherwise than the keys of a prefix.
    """
    config = model.hf_text_config
    parameters = getattr(config, "rope_parameters", None) or {}
    # Some models have parameters for each type of layer.
    kinds = [each for each in parameters.values() if isinstance(each, dict)] or [parameters]
    for rope in kinds:
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        # Beyond the original length vLLM takes the factors of long texts, from the first position on.
        if rope.get("rope_type") == "longrope" and model.max_model_len > original:
            raise PrefixServeError(
                f"With LongRoPE and a --max-model-len over {original}, vLLM rotates the keys of short texts as those of long ones, "
                f"unlike the keys of a prefix; start with --max-model-len {original}."
            )
