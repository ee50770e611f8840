"""The plugin's logger: a child of vLLM's, so that vLLM's handlers and level apply to it."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.prefix_adapters")
