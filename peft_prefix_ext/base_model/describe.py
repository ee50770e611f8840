"""What messages call a model: what is supported is a question of the architecture, and of the release that implements it."""

from __future__ import annotations

from typing import Any

import transformers


def describe(module: Any) -> str:
    """Returns the name of a model or of one of its modules: `LlamaForCausalLM (model type 'llama', transformers 5.19.0)`."""
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    kind = f"model type {model_type!r}, " if model_type else ""
    return f"{type(module).__name__} ({kind}transformers {transformers.__version__})"
