"""The layers of an engine, and the part of a prefix that each worker holds of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
)

from peft_prefix_ext.checkpoint.format import LayerKV
from vllm_plugin.adapters.cache_layout import AS_TRANSFORMERS, CacheLayout, halves_to_pairs
from vllm_plugin.adapters.registry import Registry
from vllm_plugin.adapters.validation import check_shapes
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.worker.cache_layers import CacheLayer, cache_layers, model_shapes, shard, stacks_of


def layer(index: int, heads: int = 2, size: int = 32, group: int = 0, value_size: int | None = None) -> CacheLayer:
    return CacheLayer(f"model.layers.{index}.self_attn.attn", index, group, 32, heads, size, value_size or size)


@pytest.mark.parametrize("value_size", [32, 16])
@pytest.mark.parametrize(("heads", "tp_size"), [(2, 1), (1, 2), (1, 4)])
def test_each_rank_has_its_heads(heads: int, tp_size: int, value_size: int) -> None:
    kv, own = LayerKV(torch.randn(2, 4, 32), torch.randn(2, 4, value_size)), layer(0, heads, value_size=value_size)
    shards = [shard("one", kv, own, rank, tp_size) for rank in range(tp_size)]
    for kind in (0, 1):
        together = torch.cat([part[kind] for part in shards], dim=1).transpose(0, 1)
        assert together.equal(kv[kind].repeat_interleave(max(1, tp_size // 2), 0))
    # The model has two heads, whatever the number of ranks.
    assert model_shapes([own], tp_size, 2) == ((0, 2, 32, value_size),)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_each_rank_has_the_whole_latent(tp_size: int) -> None:
    kv, layout = LayerKV(torch.randn(1, 4, 32), torch.randn(1, 4, 16)), CacheLayout(32, reorder_value=halves_to_pairs)
    (own,) = cache_layers(config_of(([0], latent_spec())), layout)
    assert (own.num_kv_heads, own.key_size, own.value_size) == (1, 32, 16)
    assert model_shapes([own], tp_size, 1) == ((0, 1, 32, 16),)
    for rank in range(tp_size):
        part = shard("one", kv, own, rank, tp_size)
        assert part.key.equal(kv.key.transpose(0, 1))
        assert part.value[..., 0::2].equal(kv.value[..., :8].transpose(0, 1))
        assert part.value[..., 1::2].equal(kv.value[..., 8:].transpose(0, 1))


@pytest.mark.parametrize(("other", "tp_size"), [(layer(0, 2), 2), (layer(0, 2, 64), 1), (layer(0, value_size=16), 1)])
def test_a_prefix_of_another_shape_is_refused(other: CacheLayer, tp_size: int) -> None:
    kv = LayerKV(torch.randn(2, 4, 32), torch.randn(2, 4, 32))
    with pytest.raises(PrefixServeError, match="layer 0 has 2 KV heads of sizes"):
        shard("one", kv, other, 0, tp_size)


def test_a_pipeline_stage_checks_and_publishes_its_own_layers(tmp_path: Path) -> None:
    stages = [model_shapes([layer(1), layer(0)], 1, 2), model_shapes([layer(3), layer(2)], 1, 2)]
    whole = (*stages[0], *stages[1])
    assert (Registry(tmp_path).layers(), Registry(tmp_path).block_size()) == (None, None)
    for stage in stages:
        check_shapes("one", whole, stage, whole_model=False)
        with pytest.raises(PrefixServeError, match="without a prefix"):
            check_shapes("one", whole[:1], stage, whole_model=False)
        with pytest.raises(PrefixServeError, match="without a cache"):
            check_shapes("one", whole, stage)
    # The stages run in separate processes, in any order.
    for stage in reversed(stages):
        Registry(tmp_path).add_layers(stage, 32)
    Registry(tmp_path).add_layers(stages[0], 48)
    assert Registry(tmp_path).layers() == whole
    assert Registry(tmp_path).block_size() == 96


def test_layers_of_one_shape_are_one_stack() -> None:
    layers = [layer(0), layer(1, group=1), layer(2), layer(3, size=64), layer(4, group=1), layer(5, value_size=16)]
    assert [[each.index for each in stack.layers] for stack in stacks_of(layers)] == [[0, 2], [1, 4], [3], [5]]


def config_of(*groups: tuple[list[int], Any]) -> KVCacheConfig:
    names = [([f"model.layers.{index}.self_attn.attn" for index in indices], spec) for indices, spec in groups]
    return KVCacheConfig(8, [], [KVCacheGroupSpec(*group) for group in names])


def latent_spec() -> MLAAttentionSpec:
    """Returns the cache of a latent of 32 numbers and 16 rotated ones."""
    return MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=48, dtype=torch.bfloat16)


def test_layers_of_a_kv_cache_config() -> None:
    sizes = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
    full = FullAttentionSpec(**sizes)
    sliding = SlidingWindowSpec(**sizes, head_size_v=16, sliding_window=64)
    assert cache_layers(config_of(([0, 2], full), ([1], sliding))) == [
        layer(0),
        layer(2),
        layer(1, group=1, value_size=16),
    ]


def test_chunked_layers() -> None:
    sizes = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
    # Without the hybrid KV cache manager, vLLM keeps all chunks, in the cache of a full layer.
    for spec in (ChunkedLocalAttentionSpec, FullAttentionSpec):
        assert cache_layers(config_of(([0], spec(**sizes, attention_chunk_size=64)))) == [layer(0)]


def test_layers_with_two_attention_modules_are_two_layers() -> None:
    names = [f"model.layers.{index}.self_attn.{module}.attn" for index in (0, 1) for module in (0, 1)]
    config = KVCacheConfig(8, [], [KVCacheGroupSpec(names, latent_spec())])
    layers = cache_layers(config, CacheLayout(32, attentions_per_layer=2))
    assert [each.index for each in layers] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("groups", "layout", "message"),
    [
        ([([0], SinkFullAttentionSpec)], AS_TRANSFORMERS, "chunked or latent; .* of type SinkFullAttentionSpec"),
        ([([0], MLAAttentionSpec)], AS_TRANSFORMERS, "chunked or latent; .* of type MLAAttentionSpec"),
        ([([0], FullAttentionSpec)], CacheLayout(16), "chunked or latent; .* of type FullAttentionSpec"),
        ([([0], FullAttentionSpec), ([0], FullAttentionSpec)], AS_TRANSFORMERS, "one KV cache per layer; .* share one"),
    ],
)
def test_layers_of_another_kind_are_refused(
    groups: list[tuple[list[int], Any]], layout: CacheLayout, message: str
) -> None:
    sizes = {"block_size": 32, "num_kv_heads": 1, "head_size": 32, "dtype": torch.bfloat16}
    with pytest.raises(PrefixServeError, match=message):
        cache_layers(config_of(*((indices, spec(**sizes)) for indices, spec in groups)), layout)
