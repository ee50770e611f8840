"""Runs some of vLLM's CUDA kernels against torch: whether the library that is installed works on this GPU at all.

    python -m benchmarks.gpu.steps.kernels --out kernels.json

A kernel that fails is recorded with its error, since the others are still worth knowing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.steps.arguments import parser_of

LARGEST_ERROR = 0.02  # relative, in bfloat16


def main(arguments: list[str] | None = None) -> int:
    options = parser_of("kernels", __doc__).parse_args(arguments)
    start = time.perf_counter()
    found = {**platform(), "kernels": {kernel.__name__: outcome(kernel) for kernel in KERNELS}}
    torch.cuda.synchronize()
    right = [
        value is True or (isinstance(value, float) and value < LARGEST_ERROR) for value in found["kernels"].values()
    ]
    found |= {"ok": all(right), "seconds": round(time.perf_counter() - start, 1)}
    options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0 if found["ok"] else 1


def platform() -> dict[str, Any]:
    """Returns what vLLM takes this machine for."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return {
        "platform": type(current_platform).__name__,
        "capability": list(torch.cuda.get_device_capability()),
        "triton": bool(HAS_TRITON),
    }


def outcome(kernel: Callable[[], float | bool]) -> float | bool | str:
    """Returns what a kernel's check returns, or its error."""
    torch.manual_seed(0)
    try:
        return kernel()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:400]


def rms_norm() -> float:
    from vllm import _custom_ops as ops

    x, weight = _random(64, 4096), _random(4096)
    out = torch.full_like(x, torch.nan)
    ops.rms_norm(out, x, weight, 1e-6)
    return _error(out, F.rms_norm(x.float(), (4096,), weight.float(), 1e-6))


def silu_and_mul() -> float:
    import vllm._custom_ops  # noqa: F401, which loads the library

    x = _random(64, 8192)
    out = torch.full_like(x[:, :4096], torch.nan)
    torch.ops._C.silu_and_mul(out, x)
    return _error(out, F.silu(x[:, :4096].float()) * x[:, 4096:].float())


def reshape_and_cache() -> bool:
    """Writes keys and values into a paged cache, as every load of a prefix does; the copies must be exact."""
    from vllm import _custom_ops as ops

    key, value = (_random(40, 8, 128) for _ in range(2))
    keys, values = (torch.zeros(8, 16, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    slots, one = torch.randperm(128, device="cuda")[:40], torch.ones((), device="cuda")
    ops.reshape_and_cache_flash(key, value, keys, values, slots, "auto", one, one)
    return all(
        bool((cache.view(128, 8, 128)[slots] == given).all())
        for cache, given in zip((keys, values), (key, value), strict=True)
    )


def flash_attention() -> float:
    """Two prompts in one batch, with grouped queries, by the version that vLLM chooses here."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    query, key, value = (_random(256, heads, 128) for heads in (32, 8, 8))
    ends = torch.tensor([0, 100, 256], device="cuda", dtype=torch.int32)
    out = flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        max_seqlen_q=156,
        cu_seqlens_q=ends,
        max_seqlen_k=156,
        cu_seqlens_k=ends,
        causal=True,
        fa_version=get_flash_attn_version() or 2,
    )
    want = torch.cat([_attention(query[part], key[part], value[part]) for part in (slice(0, 100), slice(100, 256))])
    return _error(out[0] if isinstance(out, tuple) else out, want)


KERNELS: tuple[Callable[[], float | bool], ...] = (rms_norm, silu_and_mul, reshape_and_cache, flash_attention)


def _attention(*parts: torch.Tensor) -> torch.Tensor:
    """Causal attention in float32; each part is `[tokens, heads, head_dim]`."""
    query, key, value = (part.float().transpose(0, 1) for part in parts)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(0, 1)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _error(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found.float() - want).norm() / want.norm())


if __name__ == "__main__":
    sys.exit(main())
