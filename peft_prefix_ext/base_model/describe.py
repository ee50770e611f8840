"""How error messages name a model: support depends on the architecture and on the release that implements it."""

from __future__ import annotations

from typing import Any

import transformers


def describe(module: Any) -> str:
    """Returns a name like `LlamaForCausalLM (model type 'llama', transformers 5.19.0)` of a model or a module of one."""
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    kind = f"model type {model_type!r}, " if model_type else ""
    return f"{type(module).__name__} ({kind}transformers {transformers.__version__})"
