"""What `cpu_defects` mends, in workers that are processes of their own: Python imports this module when it starts."""

from __future__ import annotations

from typing import Any

import wrapt


def _rotary_in_torch(base: Any) -> None:
    base.RotaryEmbedding.forward_cpu = base.RotaryEmbedding.forward_native


wrapt.register_post_import_hook(_rotary_in_torch, "vllm.model_executor.layers.rotary_embedding.base")
