"""The environment of every engine that the tests start."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # no compilation
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
