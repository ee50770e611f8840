"""The part of a trained state that each rank holds, against vLLM's own shapes and weight loaders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.mamba.mamba_mixer2 import mamba_v2_sharded_weight_loader
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator, get_conv_state_layout

from peft_prefix_ext.checkpoint.format import LayerState
from vllm_plugin.worker.state_layout import StateLayout, layout_of, part_of_rank

KERNEL_SIZE = 4


def module(name: str, **fields: Any) -> Any:
    return type(name, (SimpleNamespace,), {})(**fields)


def mamba2(n_groups: int, tp_size: int) -> Any:
    norm = SimpleNamespace(n_groups=n_groups)
    sizes = {"intermediate_size": 64, "num_heads": 8, "head_dim": 8, "ssm_state_size": 6}
    return module("MambaMixer2", norm=norm, tp_size=tp_size, conv_kernel_size=KERNEL_SIZE, **sizes)


def gated_delta_net() -> Any:
    heads = {"num_k_heads": 4, "num_v_heads": 8, "head_k_dim": 6, "head_v_dim": 10, "key_dim": 24, "value_dim": 80}
    return module("QwenGatedDeltaNetAttention", conv_kernel_size=KERNEL_SIZE, **heads)


def random_state(layout: StateLayout) -> LayerState:
    """Returns a state whose first column numbers the channels."""
    conv, *recurrent = (torch.randn(shape.shape) for shape in layout.shapes(0))
    conv[:, 0] = torch.arange(len(conv))
    return LayerState((conv,), tuple(recurrent))


def channels_of_rank(specs: list[tuple[int, int, bool]], num_channels: int, tp_rank: int, tp_size: int) -> list[int]:
    """Returns the channels that vLLM's loader gives to a rank."""
    weight = torch.arange(num_channels, dtype=torch.float32)[:, None]
    param = torch.nn.Parameter(torch.full((sum(full for full, _, _ in specs) // tp_size, 1), -1.0))
    mamba_v2_sharded_weight_loader(specs, tp_size, tp_rank)(param, weight)
    return param[:, 0].int().tolist()


@pytest.fixture(params=["SD", "DS"])
def dim_first(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", request.param)
    get_conv_state_layout.cache_clear()
    yield request.param == "DS"
    get_conv_state_layout.cache_clear()


@pytest.mark.parametrize("num_speculative", [0, 2])
@pytest.mark.parametrize(("n_groups", "tp_size"), [(1, 1), (4, 1), (1, 2), (4, 2), (2, 2), (1, 4), (4, 4)])
def test_mamba2(n_groups: int, tp_size: int, num_speculative: int, dim_first: bool) -> None:
    layer = mamba2(n_groups, tp_size)
    layout = layout_of(layer)
    assert layout is not None
    state = random_state(layout)
    group_channels = n_groups * layer.ssm_state_size
    copies = (tp_size - n_groups) * layer.ssm_state_size if n_groups % tp_size else 0
    specs = [(64, 0, False), *[(group_channels + copies, copies, n_groups == 1)] * 2]
    shapes = MambaStateShapeCalculator.mamba2_state_shape(
        tp_world_size=tp_size,
        intermediate_size=64,
        n_groups=n_groups,
        num_heads=8,
        head_dim=8,
        state_size=6,
        conv_kernel=KERNEL_SIZE,
        num_spec=num_speculative,
    )
    for rank in range(tp_size):
        conv, recurrent = part_of_rank(state, layout, shapes, [torch.float32, torch.bfloat16], rank, tp_size)
        assert (conv.shape, recurrent.shape) == shapes
        conv = conv if dim_first else conv.T
        channels = channels_of_rank(specs, 64 + 2 * group_channels, rank, tp_size)
        assert conv[:, : KERNEL_SIZE - 1].equal(state.conv[0][channels])
        assert not conv[:, KERNEL_SIZE - 1 :].any()
        assert recurrent.equal(state.recurrent[0].bfloat16().chunk(tp_size)[rank])


@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_gated_delta_net(tp_size: int, swaps: bool, dim_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_plugin.worker.state_layout.current_platform", SimpleNamespace(is_cpu=lambda: not swaps))
    layout = layout_of(gated_delta_net())
    assert layout is not None
    state = random_state(layout)
    specs = [(24, 0, False), (24, 0, False), (80, 0, False)]
    shapes = MambaStateShapeCalculator.gated_delta_net_state_shape(tp_size, 4, 8, 6, 10, KERNEL_SIZE)
    for rank in range(tp_size):
        conv, recurrent = part_of_rank(state, layout, shapes, [torch.float32] * 2, rank, tp_size)
        assert (conv.shape, recurrent.shape) == shapes
        channels = channels_of_rank(specs, 128, rank, tp_size)
        assert (conv if dim_first else conv.T).equal(state.conv[0][channels])
        heads = state.recurrent[0].chunk(tp_size)[rank]
        # Kernels for CPUs read the same memory as [heads, k, v].
        assert (recurrent.transpose(1, 2) if swaps else recurrent.view(heads.shape)).equal(heads)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_short_convolution(tp_size: int, dim_first: bool) -> None:
    layout = layout_of(module("ShortConv", conv_dim=16, L_cache=3))
    assert layout is not None
    state = random_state(layout)
    shapes = MambaStateShapeCalculator.short_conv_state_shape(tp_size, 16, 3)
    for rank in range(tp_size):
        (conv,) = part_of_rank(state, layout, shapes, [torch.float32], rank, tp_size)
        assert conv.shape == shapes[0]
        assert (conv if dim_first else conv.T).equal(state.conv[0].chunk(tp_size)[rank])


def test_other_classes_have_no_layout() -> None:
    assert layout_of(module("MambaMixer")) is None
