"""In half precision and with an fp8 cache, a prefix leaves the same bytes in the cache as the text it was made from.

Outputs in such dtypes depend on the order of sums, so no reference outside of the engine is exact. Inside there is one:
the K/V that the engine computes for a text, used as a prefix, must give the same outputs as the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.serving import support
from helpers.serving.engines import Engine
from helpers.serving.support import BLOCK_SIZE, prompt_ids

# Two blocks and a tail.
ALIGNED, LENGTH = 64, 77


@contextmanager
def recorded(engine: Engine) -> Iterator[list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]]:
    """Records every write to the cache of each layer: keys and values, `[N, H, D]`, and slots, `[N]`."""
    writes: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in attention(engine):
            writes.append([])
            original = module.impl.do_kv_cache_update

            def record(layer: Any, *args: Any, original: Any = original, noted: Any = writes[-1]) -> None:
                key, value, _, slots = args
                noted.append((key.clone(), value.clone(), slots.clone()))
                original(layer, *args)

            patch.setattr(module.impl, "do_kv_cache_update", record)
        yield writes


def attention(engine: Engine) -> list[Any]:
    ((_, modules),) = engine.writer._stacks
    return modules


def answer(engine: Engine, name: str | None, prompt: list[int]) -> list[dict[int, float]]:
    """Returns the best tokens at each step, and their log-probabilities, exactly."""
    (output,) = engine.generate([name], [prompt], max_tokens=16, logprobs=5)
    return [{token: entry.logprob for token, entry in row.items()} for row in output.outputs[0].logprobs]


NEEDS_FP8 = pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM refuses an fp8 cache on a CPU without AVX-512 and AMX",
)


@pytest.mark.parametrize(
    ("dtype", "cache"),
    [
        pytest.param("bfloat16", "fp8", marks=NEEDS_FP8),
        pytest.param("bfloat16", "auto", marks=pytest.mark.soak),
        pytest.param("float16", "auto", marks=pytest.mark.soak),
        pytest.param("float32", "fp8_e5m2", marks=[pytest.mark.soak, NEEDS_FP8]),
    ],
)
def test_a_prefix_is_its_text(engine_factory: Callable[..., Engine], tmp_path: Path, dtype: str, cache: str) -> None:
    engine = engine_factory(support.llama_config(), (7,), dtype=dtype, kv_cache_dtype=cache)
    for index, module in enumerate(attention(engine)):
        # Set by a checkpoint with scales, and only read with fp8.
        module._k_scale_float, module._v_scale_float = 0.5 + index, 0.25 + index
    text, rest = prompt_ids(LENGTH), prompt_ids(20, seed=1)
    with recorded(engine) as writes:
        engine.generate([None], [text], max_tokens=1)
    of_text = [first for first, *_ in writes]
    for length in (ALIGNED, LENGTH):
        # float32 represents every number of these dtypes.
        kv = [
            tuple(part[:length].float().transpose(0, 1).contiguous() for part in (key, value))
            for key, value, _ in of_text
        ]
        engine.register(f"text{length}", support.write_adapter(tmp_path / str(length), engine.config, kv))
        with recorded(engine) as writes:
            engine.generate([f"text{length}"], [rest], max_tokens=1)
        for module, (key, value, slots), (ours, *_) in zip(attention(engine), of_text, writes, strict=True):
            assert ours[0].dtype == key.dtype == getattr(torch, dtype)
            assert ours[0].equal(key[:length])
            assert ours[1].equal(value[:length])
            assert not slots[:length].eq(ours[2]).any()
            for start in range(0, ALIGNED, BLOCK_SIZE):
                theirs, mine = (
                    module.kv_cache[int(where[start]) // BLOCK_SIZE].contiguous().view(torch.uint8)
                    for where in (slots, ours[2])
                )
                assert mine.equal(theirs)
                assert mine.any()
    # Both find everything before `rest` in the cache, so they compute the same in the same order.
    assert answer(engine, f"text{ALIGNED}", rest) == answer(engine, None, text[:ALIGNED] + rest)
    assert answer(engine, None, rest) != answer(engine, None, text[:ALIGNED] + rest)
    unaligned, expected = answer(engine, f"text{LENGTH}", rest), answer(engine, None, text + rest)
    best = [max(row.values()) for row in expected]
    assert [max(row.values()) for row in unaligned][:4] == pytest.approx(best[:4], abs=0.1)
